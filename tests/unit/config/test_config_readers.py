"""Every key has a reader: a field of the config dataclasses is read somewhere under verl/.

Reads are found by type: variables, arguments and attributes annotated with a config class (or assigned from one) are
followed through attribute chains, so `rollout.n` counts for the class of `rollout` alone. In verl/config only the
modules whose results the trainer uses count. Run this file as a program to see which keys have no reader.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from verl.config.loader import SCHEMAS
from verl.config.schema import hints, leaves

ROOT = Path(__file__).resolve().parents[3]
COUNTED = ("derived.py", "plan.py")
"""Modules of verl/config that count: the trainer uses what they compute."""

ONE_VALUE = {
    "actor_rollout_ref.model.use_remove_padding": "the packed forward is the only one, False warns",
    "actor_rollout_ref.actor.strategy": "both values run FSDP2, others are refused",
    "actor_rollout_ref.rollout.prompt_length": "must equal data.max_prompt_length, checked at start",
    "actor_rollout_ref.rollout.response_length": "must equal data.max_response_length, checked at start",
    "algorithm.gamma": "no effect in grpo, warned about",
    "algorithm.lam": "no effect in grpo, warned about",
    "reward_model.enable": "only False is implemented, checked at start",
    "reward_model.reward_manager": "all names mean the one manager, others are refused",
}
"""Keys whose whole effect is a check or warning at start."""


def nodes_of(root: type) -> list[type]:
    found = [root]
    for node in found:
        found += [hint for hint in hints(node).values() if dataclasses.is_dataclass(hint) and hint not in found]
    return found


CLASSES = {node.__name__: node for schema in SCHEMAS.values() for node in nodes_of(schema.root)}


class Reads(ast.NodeVisitor):
    """Config fields that one module reads, as (class, field)."""

    def __init__(self, returns: dict[str, set[type]]) -> None:
        self.names: dict[str, set[type]] = {}
        self.returns = returns
        self.found: set[tuple[type, str]] = set()

    def annotated(self, name: str, annotation: ast.expr | None) -> None:
        self.names.setdefault(name, set()).update(classes_in(annotation))

    def visit_arg(self, node: ast.arg) -> None:
        self.annotated(node.arg, node.annotation)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.annotated(node.name, node.returns)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotated(last_name(node.target), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.assign(target, node.value)
        self.generic_visit(node)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.assign(one, other)
        else:
            self.names.setdefault(last_name(target), set()).update(self.type_of(value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for owner in self.type_of(node.value):
            if node.attr in hints(owner) and isinstance(node.ctx, ast.Load):
                self.found.add((owner, node.attr))
        self.generic_visit(node)

    def type_of(self, node: ast.expr) -> set[type]:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) | self.type_of(node.orelse)
        if isinstance(node, ast.Call):
            return self.returns.get(last_name(node.func), set())
        if isinstance(node, ast.Attribute):
            below = {hints(owner).get(node.attr) for owner in self.type_of(node.value)}
            return {t for t in below if t in CLASSES.values()} or self.names.get(node.attr, set())
        return set()


def classes_in(annotation: ast.expr | None) -> set[type]:
    words = re.findall(r"\w+", ast.unparse(annotation)) if annotation is not None else []
    return {CLASSES[word] for word in words if word in CLASSES}


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def reads_in(files: Iterable[Path]) -> set[tuple[type, str]]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    returns: dict[str, set[type]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and classes_in(node.returns):
                returns.setdefault(node.name, set()).update(classes_in(node.returns))
    found: set[tuple[type, str]] = set()
    for tree in trees:
        reads = Reads(returns)
        # Twice: a method may read an attribute that a later one assigns.
        for _ in range(2):
            reads.visit(tree)
        found |= reads.found
    return found


def unread(files: Iterable[Path]) -> list[str]:
    """Keys of the yaml files that no module reads."""
    found = reads_in(files)

    def is_read(owner: type, name: str) -> bool:
        return any(field == name and (issubclass(owner, c) or issubclass(c, owner)) for c, field in found)

    missing: list[str] = []
    for file, schema in SCHEMAS.items():
        for key, _ in leaves(schema.root):
            if file == "generation" and key.startswith("rollout."):
                continue  # the class of actor_rollout_ref.rollout, judged there
            owner: Any = schema.root
            *path, name = key.split(".")
            for part in path:
                owner = hints(owner)[part]
            if not is_read(owner, name) and not (file == "ppo_trainer" and key in ONE_VALUE):
                missing.append(f"{file} {key}")
    return missing


def sources() -> list[Path]:
    config = ROOT / "verl" / "config"
    files = [file for file in (ROOT / "verl").rglob("*.py") if config not in file.parents]
    return files + [config / name for name in COUNTED]


def test_invariant_6_every_key_has_a_reader() -> None:
    assert unread(sources()) == []


def test_keys_of_one_value_exist() -> None:
    keys = {f"{file} {key}" for file, schema in SCHEMAS.items() for key, _ in leaves(schema.root)}
    assert [key for key in ONE_VALUE if f"ppo_trainer {key}" not in keys] == []


def test_a_read_counts_for_its_own_class_only(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "class Worker:\n"
        "    def __init__(self, config: PPOConfig) -> None:\n"
        "        self.rollout = config.actor_rollout_ref.rollout\n"
        "    def run(self) -> int:\n"
        "        answers, other = self.rollout.n, self.thing.temperature\n"
        "        return self.rollout.val_kwargs.top_k\n"
    )
    missing = unread([module])
    assert "ppo_trainer actor_rollout_ref.rollout.n" not in missing
    assert "ppo_trainer actor_rollout_ref.rollout.val_kwargs.top_k" not in missing
    for key in ("rollout.val_kwargs.n", "rollout.top_k", "rollout.temperature", "actor.grad_clip"):
        assert f"ppo_trainer actor_rollout_ref.{key}" in missing


if __name__ == "__main__":
    print("\n".join(unread(sources())))
