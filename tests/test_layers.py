"""Imports go downwards only: the layer table of the architecture, checked line by line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "fewbits"

LAYERS: dict[str, float] = {
    "errors": -1,
    "kernels": 0,
    "grids": 1,
    "activations": 1,
    "tensor": 2,
    "stats": 2,
    "storage": 2,
    "split": 3,
    "solve": 4,
    "transform": 4,
    "plan": 5,
    "methods": 5.5,
    "model": 6,
    "formats": 6,
    "runtime": 7,
    "allocate": 7,
    "pipeline": 8,
    "fake": 7,
    "tune": 7.5,
    "api": 9,
    "evaluate": 9,
    "report": 9,
    "compare": 9.5,
    "advise": 9,
    "finetune": 9,
    "engine": 9,
    "cli": 10,
    "__main__": 11,
}


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted module below fewbits) of every import of our own, lazy and type-checking ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, ("fewbits", *package[: len(package) - node.level + 1], base)))
            # `from fewbits.x import y` may name the module fewbits.x.y; the module itself when y is no file.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fewbits":
                yield node.lineno, name.removeprefix("fewbits").lstrip(".")


def module(dotted: str, root: Path) -> str:
    """The file that ``dotted`` means, as a dotted path below the root: ``formats.gptq``, ``formats``."""
    parts = dotted.split(".")
    while parts:
        here = root.joinpath(*parts)
        if here.with_suffix(".py").is_file() or (here / "__init__.py").is_file() or here.is_dir():
            return ".".join(parts)
        parts.pop()
    return ""


def offences(root: Path) -> list[str]:
    """One line for each import that breaks a rule: ``file:line: why``."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public names, of every layer
        own = parts[0]
        package = parts[:-1]
        for line, dotted in imported(ast.parse(file.read_text(encoding="utf-8")), package):
            target = module(dotted, root)
            top = target.split(".")[0]
            where = f"{file.relative_to(root)}:{line}"
            if not top or top == own:
                continue
            if own not in LAYERS or top not in LAYERS:
                found.append(f"{where}: {own if own not in LAYERS else top} is in no layer; add it to the table")
            elif LAYERS[top] >= LAYERS[own]:
                found.append(
                    f"{where}: {own} (layer {LAYERS[own]:g}) imports fewbits.{target} (layer {LAYERS[top]:g}); "
                    "a file imports from lower layers only"
                )
    return found + cycles(root)


def cycles(root: Path) -> list[str]:
    """Files of one package may share code with each other (``base``, helpers) but never in a circle."""
    graph: dict[str, dict[str, int]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if len(parts) < 2 or parts[-1] == "__init__":
            continue  # a package's __init__ collects its files
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[".".join(parts)] = {
            module(dotted, root): line
            for line, dotted in imported(tree, parts[:-1])
            if dotted.startswith(parts[0] + ".")
        }
    found = []
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name == start:
                found.append(f"{start.replace('.', '/')}.py:1: imports itself through {', '.join(sorted(seen))}")
                break
            if name not in seen and name in graph:
                seen.add(name)
                todo += graph[name]
    return found


def test_imports_go_downwards() -> None:
    wrong = offences(SRC)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("grids/uniform.py", "import os\nfrom fewbits.solve import x\n", "grids/uniform.py:2: grids (layer 1) imports"),
        ("solve/a.py", "def f():\n    import fewbits.transform\n", "solve/a.py:2: solve (layer 4) imports"),
        ("model/a.py", "from fewbits import formats\n", "model/a.py:1: model (layer 6) imports"),
        ("model/a.py", "from ..formats import y\n", "model/a.py:1: model (layer 6) imports"),
        ("extra.py", "from fewbits import formats\n", "extra.py:1: extra is in no layer"),
        ("formats/a.py", "from fewbits.formats.b import y\n", "formats/a.py:1: imports itself through formats.b"),
    ],
)
def test_names_the_offending_line(tmp_path: Path, file: str, code: str, expected: str) -> None:
    for package in ("grids", "solve", "transform", "model", "formats"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "formats" / "b.py").write_text("from fewbits.formats import a\n")
    (tmp_path / file).write_text(code)
    found = offences(tmp_path)
    assert any(line.startswith(expected) for line in found), found


def test_downward_imports_pass(tmp_path: Path) -> None:
    for package in ("grids", "solve"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "errors.py").write_text("")
    (tmp_path / "solve" / "a.py").write_text(
        "from fewbits.grids import Int\nfrom fewbits.errors import RequestError\nimport torch\n"
    )
    assert offences(tmp_path) == []
