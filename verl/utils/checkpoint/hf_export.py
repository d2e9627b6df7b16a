"""A sharded model to a plain Hugging Face folder that `from_pretrained` and vLLM load.

Touches transformers internals only through `save_pretrained` (run on 5.17.0), which gives the tensors the names of the
published checkpoints.

Invariants
- The weights in the folder equal the model's, cast to the asked dtype.
- Every rank takes part in each gather, whatever it holds; only rank 0 keeps tensors and writes.
- Tokenizer, chat template and image processor are the source folder's, byte for byte.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.models.lora import adapted_layers, is_adapter, merged
from verl.utils.checkpoint.sharded import model_state
from verl.utils.files import fsync_tree, write_json_atomic

_COPIED = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.py")
_NOT_COPIED = ("config.json", "generation_config.json", "*.index.json")
GENERATION_CONFIG = "generation_config.json"


def gather_full(state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Full CPU tensors on rank 0, an empty dict elsewhere. Collective: all ranks give the same names in one order.

    Floating-point tensors are cast to `dtype` before they travel.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, tensor in state.items():
        value = tensor.detach()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if first:
            gathered[name] = value.cpu()
    return gathered


def export_huggingface(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    suppress_tokens: Sequence[int] | None = None,
) -> None:
    """Write config, weights (adapters merged), tokenizer and processor files to `folder`, flushed. Collective.

    `model` is the transformers model, sharded by FSDP2 or not; `source` the local folder it came from;
    `suppress_tokens` the ids that the policy may not draw, stored in the generation config.
    Raises ValueError when `source` is not a model folder.
    """
    folder, source = Path(folder), Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json, not a local model folder")
    state = model_state(model)
    weights = gather_full({name: t for name, t in state.items() if not is_adapter(name)}, dtype=dtype)
    adapters = gather_full({name: t for name, t in state.items() if is_adapter(name)})
    if adapters:
        weights = merged(weights, adapters, next(iter(adapted_layers(model).values())).lora_scale)
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copy_model_files(source, folder)
        _skeleton(model, dtype).save_pretrained(folder, state_dict=weights)
        _write_generation_config(source, folder, suppress_tokens)
        fsync_tree(folder)
    if dist.is_initialized():
        dist.barrier()


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy everything a model folder holds beside config and weights: tokenizer, chat template, processors, code."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not any(path.match(name) for name in _NOT_COPIED):
                shutil.copyfile(path, folder / path.name)


def _skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same architecture without memory, of the class that FSDP2 replaced by its own."""
    plain = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    assert issubclass(plain, PreTrainedModel), f"{type(model).__name__} is not a transformers model"
    config = copy.deepcopy(model.config)
    # The running model's attention is ours by name; a new one is checked against the names of installed packages.
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part._attn_implementation = "eager"
    with torch.device("meta"):
        skeleton = plain(config)
    torch.nn.Module.to(skeleton, dtype)
    return skeleton


def _write_generation_config(source: Path, folder: Path, suppress_tokens: Sequence[int] | None) -> None:
    given = source / GENERATION_CONFIG
    content = json.loads((given if given.is_file() else folder / GENERATION_CONFIG).read_text())
    if suppress_tokens is not None:
        content["suppress_tokens"] = sorted(int(token) for token in suppress_tokens)
    write_json_atomic(folder / GENERATION_CONFIG, content)
