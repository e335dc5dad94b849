"""The pictures of the documentation from a page that `fewbits compare` wrote, in headless Chromium.

    python benchmarks/screenshots.py DIR/index.html docs/

Writes ``compare-light.png`` (1600 pixels wide), ``compare-dark.png`` (the details of one result) and
``compare-phone.png`` (390 pixels), and fails when the browser's console has something to say.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.report.browser import Browser


def main(page: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as b:
        settled = "new Promise((ok) => setTimeout(ok, 1500))"
        b.open(page, 1600, 1150)
        b.js(settled)
        b.screenshot(folder / "compare-light.png")
        b.open(page, 1600, 1150, dark=True)
        b.js("document.getElementById('errors').scrollIntoView({block: 'start'}); scrollBy(0, -130)")
        b.js(settled)
        b.screenshot(folder / "compare-dark.png")
        b.open(page, 390, 1400, dark=True)
        b.js(settled)
        b.screenshot(folder / "compare-phone.png")
        if b.problems:
            sys.exit("\n".join(b.problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
