"""Low-rank adapters (LoRA, arXiv:2106.09685): W x + scale B A x with W frozen, beside the weights they adapt.

A layer keeps its name and weight; two parameters are added to it. So a model's names stay those of the checkpoint, and
packing, sharding and weight sync need not know of adapters. Files are those of peft: what one writes the other reads.

Invariants
- A new adapter changes nothing: B is 0.
- Without adapters (`adapters_off`) the model computes what it did before they were added.
- `merged` weights give the outputs of the adapted layer, up to rounding.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_SUFFIXES = (".lora_A", ".lora_B")
_PEFT_PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Which layers get an adapter, and how large. A pattern is `all-linear`, the end of a layer's name, or a regular
    expression for the whole of it."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: A (r, in) and B (out, r)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_on: bool

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)
        if not self.lora_on:
            return base
        return base + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scale


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith(_SUFFIXES)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every layer with an adapter, by its name in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None


def target_layers(model: PreTrainedModel, spec: LoraSpec) -> dict[str, nn.Linear]:
    """The layers that `spec` names, the output head never among them (as in peft), by name.

    Raises ValueError for a pattern that fits no layer, or when none is left.
    """
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for key, patterns in (("target_modules", spec.target_modules), ("exclude_modules", spec.exclude_modules)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"model.{key}={pattern}: not a regular expression ({error}); write .* for anything"
                ) from None
            if pattern != ALL_LINEAR and not any(_matches(name, pattern) for name in linear):
                raise ValueError(f"model.{key}={pattern}: no linear layer of that name{_hint(pattern, linear)}")
    chosen = {
        name: module
        for name, module in linear.items()
        if any(p == ALL_LINEAR or _matches(name, p) for p in spec.target_modules)
        and not any(_matches(name, p) for p in spec.exclude_modules)
    }
    if not chosen:
        raise ValueError(
            f"model.target_modules={list(spec.target_modules)} less exclude_modules={list(spec.exclude_modules)} "
            "leaves no layer to adapt"
        )
    return chosen


def _hint(pattern: str, names: Mapping[str, object]) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern, ends, n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else f"; their names end in {', '.join(ends)}"


def add_adapters(model: PreTrainedModel, spec: LoraSpec, *, dtype: torch.dtype) -> None:
    """Add new adapters in `dtype` where the layers' weights are, in place. A is drawn, from a fixed seed; B is 0."""
    generator = torch.Generator().manual_seed(0)
    for layer in target_layers(model, spec).values():
        shape_a, shape_b = (spec.rank, layer.in_features), (layer.out_features, spec.rank)
        device = layer.weight.device
        a = torch.empty(shape_a, dtype=dtype, device=device)
        if not a.is_meta:
            drawn = torch.empty(shape_a)
            bound = 1.0 / math.sqrt(layer.in_features)  # kaiming_uniform with a = sqrt 5, as peft draws it
            a.copy_(drawn.uniform_(-bound, bound, generator=generator))
        layer.__class__ = LoraLinear
        layer.lora_A = nn.Parameter(a)
        layer.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))
        layer.lora_scale, layer.lora_on = spec.scale, True


def adapter_count(model: PreTrainedModel, spec: LoraSpec) -> int:
    """Parameters that `add_adapters` would add."""
    return sum(spec.rank * (m.in_features + m.out_features) for m in target_layers(model, spec).values())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters were added."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True


def add_delta(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`weight` (out, in) += scale B A, made in fp32 and rounded once to the weight's precision, in place."""
    delta = scale * (b.float() @ a.float())
    return weight.copy_(weight.float() + delta)


def merged(state: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Whole weights by name, with whole `adapters` (`{layer}.lora_A`, `{layer}.lora_B`) merged into copies of them."""
    found = dict(state)
    for name, a in adapters.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            weight = f"{layer}.weight"
            found[weight] = add_delta(found[weight].clone(), a, adapters[f"{layer}.lora_B"], scale)
    return found


# --- files of peft ----------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, adapters: Mapping[str, Tensor], spec: LoraSpec, *, base: str) -> None:
    """Write `adapter_config.json` and the whole adapters, as peft names them; `base` is the model they belong to."""
    layers = sorted({name.rsplit(".", 1)[0] for name in adapters})
    LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft says int and divides
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({f"{_PEFT_PREFIX}{name}.weight": t.contiguous() for name, t in adapters.items()}, folder / WEIGHTS_FILE)


def read_spec(folder: Path) -> LoraSpec:
    """The spec of an adapter folder. Raises ValueError when it is none, or another kind of adapter than plain LoRA."""
    file = folder / "adapter_config.json"
    if not file.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"model.lora_adapter_path={folder}: no adapter_config.json and {WEIGHTS_FILE} there")
    config = json.loads(file.read_text())
    special = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
    used = [name for name in special if config.get(name)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        kind = ", ".join([str(config.get("peft_type")), *used, f"bias={config.get('bias')}"])
        raise ValueError(f"{file}: only plain LoRA without biases can be read, this is {kind}")

    def patterns(value: str | Sequence[str] | None) -> tuple[str, ...]:
        return () if value is None else (value,) if isinstance(value, str) else tuple(sorted(value))

    return LoraSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=patterns(config["target_modules"]),
        exclude_modules=patterns(config.get("exclude_modules")),
    )


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Give the adapters of `model` the values of a folder. Raises ValueError when names or shapes differ."""
    stored = {
        name.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): value
        for name, value in load_file(folder / WEIGHTS_FILE).items()
    }
    here = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    if stored.keys() != here.keys():
        missing, extra = sorted(here.keys() - stored.keys())[:3], sorted(stored.keys() - here.keys())[:3]
        raise ValueError(f"{folder / WEIGHTS_FILE}: not the adapters of this model: missing {missing}, extra {extra}")
    for name, parameter in here.items():
        if stored[name].shape != parameter.shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} is {tuple(stored[name].shape)}, here {tuple(parameter.shape)}"
            )
        parameter.data.copy_(stored[name])
