"""Call a function in a new process, so that the memory it reports is its own.

The peak of a process never goes down: what was measured, loaded or quantized before would count. Arguments and result
travel as JSON; errors of ours come back as what they were.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

from fewbits import errors


def fresh(function: str, **arguments: Any) -> Any:
    """The result of ``package.module:function(**arguments)``, run in a new interpreter with this one's module path.

    Raises what the function raised if it is a FewbitsError; FewbitsError with the last line of its stderr when the
    process failed in another way (out of memory, killed).
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    task = json.dumps({"function": function, "arguments": arguments}, default=str)
    done = subprocess.run(
        [sys.executable, "-m", "fewbits.evaluate.fresh"], input=task, capture_output=True, text=True, env=env
    )
    lines = done.stdout.splitlines()
    answer = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        killed = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise errors.FewbitsError(f"the process that measures failed ({killed}): {last}")
    if "error" in answer:
        raise getattr(errors, answer["kind"], errors.FewbitsError)(answer["error"])
    return answer["result"]


def _serve() -> None:
    task = json.load(sys.stdin)
    module, name = task["function"].split(":")
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**task["arguments"])}
    except errors.FewbitsError as e:
        # Refused is built from parts, and read back as the request error that it is.
        kind = "RequestError" if isinstance(e, errors.Refused) else type(e).__name__
        answer = {"error": str(e), "kind": kind}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
