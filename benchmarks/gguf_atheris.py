"""Coverage-guided fuzzing of the GGUF reader: `pip install atheris`, then

    python benchmarks/gguf_atheris.py [CORPUS] [-max_total_time=600] [other options of libFuzzer]

The fuzzer's bytes are a file: it is opened, its config made, its tokenizer written and all tensors decoded; an
importance matrix is read too. Errors of ours must be one line; anything else is a finding. An empty CORPUS is filled
with small sound files first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
with atheris.instrument_imports(include=["fewbits.formats"]):
    from fewbits.errors import FewbitsError
    from fewbits.formats import gguf, gguf_imatrix, gguf_import

FOLDER = Path(tempfile.mkdtemp(prefix="fewbits-fuzz-"))


def one(data: bytes) -> None:
    """Everything that reads a file, on one file."""
    path = FOLDER / "fuzzed.gguf"
    path.write_bytes(data)
    for read in (_model, gguf_imatrix.read):
        try:
            read(path)
        except FewbitsError as e:
            assert "\n" not in str(e).replace(str(path), ""), "an error of more than one line"


def _model(path: Path) -> None:
    file = gguf.read(path)
    gguf_import.config_of(file)
    gguf_import.write_tokenizer(file, FOLDER)
    for name in file.infos:
        file.tensor(name)


def main() -> None:
    corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if corpus is not None and not any(corpus.glob("*")):
        import gguf_fuzz

        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as made:
            for file in gguf_fuzz.seeds(Path(made)):
                (corpus / file.name).write_bytes(file.read_bytes())
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
