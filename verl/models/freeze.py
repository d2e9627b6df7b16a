"""Which parameters are trained, by name pattern, and the table of them that a run prints."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from verl.models.lora import is_adapter

_PARTS = (
    ("adapters", is_adapter),
    ("vision merger", lambda name: ".visual.merger." in f".{name}"),
    ("vision tower", lambda name: ".visual." in f".{name}"),
    ("embedding", lambda name: name.endswith("embed_tokens.weight")),
    ("text blocks", lambda name: ".language_model.layers." in f".{name}"),
    ("head", lambda name: name.endswith("lm_head.weight")),
    ("other", lambda name: True),
)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters that any shell pattern (`*.layers.0.*`) fits; names are those of the checkpoint.

    Raises ValueError for a pattern that fits none, or when nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        fitting = fnmatch.filter(parameters, pattern)
        if not fitting:
            near = difflib.get_close_matches(pattern, parameters, n=2, cutoff=0.4)
            raise ValueError(f"freeze={pattern}: fits no parameter" + (f"; near: {', '.join(near)}" if near else ""))
        for name in fitting:
            parameters[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"freeze={list(patterns)} leaves nothing to train")


def parameter_table(model: nn.Module) -> str:
    """Lines for people: per part tensors, parameters and how many of them are trained; a line with the sum."""
    rows: dict[str, list[int]] = {part: [0, 0, 0] for part, _ in _PARTS}
    for name, parameter in model.named_parameters():
        row = rows[next(part for part, holds in _PARTS if holds(name))]
        row[0] += 1
        row[1] += parameter.numel()
        row[2] += parameter.numel() if parameter.requires_grad else 0
    total, trained = sum(r[1] for r in rows.values()), sum(r[2] for r in rows.values())
    lines = [f"{trained:,} of {total:,} parameters trained"]
    for part, (tensors, size, used) in rows.items():
        if tensors:
            state = "trained" if used == size else "frozen" if not used else f"{used:,} trained"
            lines.append(f"  {part:<14}{tensors:>6} tensors {size:>15,}  {state}")
    return "\n".join(lines)
