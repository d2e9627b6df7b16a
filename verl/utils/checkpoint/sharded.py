"""Sharded tensors to safetensors files and back, on any number of ranks (torch DCP with Hugging Face storage).

Every rank writes its own shard; loading reads whatever pieces the new layout needs, so that W ranks may save and V
ranks load. No pickle is written or read. Every rank calls each function here and must see the folder.

Invariants
- What is loaded equals what was saved, bit for bit, for parameters and optimizer state, on any world size.
- A missing, extra or reshaped tensor, or a shard that is gone, is an error before anything is overwritten.
- Of a tensor with two names (tied head) the first is stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_STEP = "step"


def save_sharded(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write `state` (plain tensors are the same on all ranks, DTensors sharded) to a new or empty folder, flushed.

    Raises ValueError when the folder holds safetensors files already: their shards would be read as ours.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _barrier()
    if present := sorted(path.name for path in folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: already holds {present[:3]}; save into an empty folder")
    _barrier()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        dcp.save({name: tensor.detach() for name, tensor in state.items()}, storage_writer=writer, no_dist=_alone())


def load_sharded(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from a folder of `save_sharded`.

    Raises ValueError naming the folder and the tensors when names, shapes or dtypes differ or a shard is missing.
    """
    stored = stored_tensors(folder)
    missing, extra = sorted(set(state) - set(stored)), sorted(set(stored) - set(state))
    if missing or extra:
        raise ValueError(f"{folder}: not the tensors of this model: missing {missing[:5]}, unexpected {extra[:5]}")
    for name, tensor in state.items():
        there, here = stored[name], (tensor.shape, tensor.dtype)
        if there != here:
            raise ValueError(f"{folder}: {name} is {_show(*there)} there but {_show(*here)} here")
    reader = HuggingFaceStorageReader(str(folder))
    with _quiet():
        dcp.load({name: tensor.detach() for name, tensor in state.items()}, storage_reader=reader, no_dist=_alone())


def stored_tensors(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, full shapes and dtypes in a folder of `save_sharded`. Raises ValueError when it is empty or has holes."""
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no safetensors files here")
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:
        raise ValueError(f"{folder}: unreadable safetensors file: {error}") from error
    stored = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{folder}: {name} is a {type(entry).__name__}"
        # the reader leaves a hole of a lost shard unread, silently
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.size):
            raise ValueError(
                f"{folder}: {name} has {covered} of {math.prod(entry.size)} values: a shard file is missing"
            )
        stored[name] = (entry.size, entry.properties.dtype)
    return stored


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; the second name of a shared tensor is left out."""
    parameters = dict(model.named_parameters())
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every_name}
    return {**parameters, **buffers}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, flat: `{kind}/{parameter name}` for kind exp_avg, exp_avg_sq, step, ...

    Parameters that were never updated have none. Learning rates and other settings are not among them.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    flat = {}
    for parameter, entries in optimizer.state.items():
        for kind, value in entries.items():
            assert isinstance(value, Tensor), f"optimizer state {kind} of {names[parameter]} is {type(value).__name__}"
            flat[f"{kind}/{names[parameter]}"] = value
    return flat


def save_optimizer(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's tensors; before its first step there are none, and the folder stays empty."""
    state = optimizer_state(model, optimizer)
    if state:
        save_sharded(folder, state)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)


def load_optimizer(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer exactly the stored state, also a fresh one that has not stepped yet.

    Raises ValueError when the folder holds state of a parameter that the optimizer does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no optimizer state here")
    stored = stored_tensors(folder) if any(folder.glob("*.safetensors")) else {}
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for key, (_, dtype) in stored.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in groups:
            raise ValueError(f"{folder}: holds {kind} of {name!r}, which this optimizer does not train")
        optimizer.state[parameter][kind] = _empty_state(kind, parameter, dtype, groups[parameter])
    if stored:
        load_sharded(folder, optimizer_state(model, optimizer))


def _empty_state(kind: str, parameter: Tensor, dtype: torch.dtype, group: Mapping[str, object]) -> Tensor:
    if kind != _STEP:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format).detach()
    # torch keeps the step count on the device for these two only
    on_device = group.get("fused") or group.get("capturable")
    return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")


def _show(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _alone() -> bool:
    return not dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process alone is one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
