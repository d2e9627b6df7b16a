"""Whether a test really sets a key: read from its source, with the fixtures, helpers and constants that it reaches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def uses(evidence: str, key: str) -> bool:
    """Whether the test `tests/...py::name` sets `key`, as `key=` in a text it can reach.

    Raises AssertionError when the file or the test in it does not exist.
    """
    path, _, name = evidence.partition("::")
    file = ROOT / path
    assert path.startswith("tests/") and file.is_file(), f"{evidence}: there is no such file under tests/"
    own = definitions(file)
    assert name.startswith("test_") and isinstance(own.get(name), ast.FunctionDef), f"{evidence}: no such test there"
    known = {k: v for module in reversed(_modules(file)) for k, v in definitions(module).items()} | own
    return any(re.search(rf"(^|[\s+'\"]){re.escape(key)}(=|$)", text) for text in _texts(name, known))


@cache
def definitions(file: Path) -> dict[str, ast.AST]:
    """Functions, also of classes, and constants of a module, by name."""
    found: dict[str, ast.AST] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _modules(file: Path) -> list[Path]:
    """The conftest files above a test and the modules of tests/ that it imports."""
    folders = [folder for folder in file.parents if folder.is_relative_to(ROOT / "tests")]
    found = [folder / "conftest.py" for folder in folders]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [folder / f"{node.module}.py" for folder in folders]
    return [path for path in found if path.is_file()]


def _texts(start: str, known: dict[str, ast.AST]) -> Iterator[str]:
    """Every text that the definition `start` can reach; in an f-string, constants by their value."""
    waiting, seen = [start], {start}
    while waiting:
        for node in ast.walk(known[waiting.pop()]):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
            if name in known and name not in seen:
                seen.add(name)
                waiting.append(name)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(_part(value, known) for value in node.values)


def _part(node: ast.expr, known: dict[str, ast.AST]) -> str:
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        constant = known.get(node.value.id)
        return constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, str) else "?"
    return str(node.value) if isinstance(node, ast.Constant) else "?"
