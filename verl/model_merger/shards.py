"""Reads `model_world_size_{W}_rank_{R}.pt`, the shards that verl's FSDP workers write, and puts tensors together.

A shard is a `torch.save`d dict of DTensors (plain tensors where W is 1 or a buffer is the same everywhere). DTensor
internals are touched here only: run on torch 2.13, and on pickles in the layout of torch 2.6, whose DeviceMesh keeps
its ranks in another attribute.

Invariants
- Nothing but tensors and the classes listed here is unpickled (`weights_only=True`).
- All W shards are there, whole (their checksums agree) and of the same names, or ValueError names the file.
- Replicas agree bit for bit; a tensor is its shards in rank order, of the full shape that each shard states.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_CLASSES = (DTensor, DeviceMesh, DTensorSpec, TensorMeta, Shard, Replicate)
_OLD_PLACES = {
    "torch.distributed._tensor.api.DTensor": DTensor,
    "torch.distributed._tensor.placement_types.Shard": Shard,
    "torch.distributed._tensor.placement_types.Replicate": Replicate,
    "torch.distributed._tensor.placement_types.DTensorSpec": DTensorSpec,
    "torch.distributed._tensor.placement_types.TensorMeta": TensorMeta,
    "torch.distributed._tensor._dtensor_spec.DTensorSpec": DTensorSpec,
    "torch.distributed._tensor._dtensor_spec.TensorMeta": TensorMeta,
}
"""Where torch before 2.5 kept them."""


def find_shards(folder: Path) -> list[Path]:
    """The shards of a folder in rank order. Raises ValueError naming what is missing."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    if not found:
        raise ValueError(f"{folder}: no model_world_size_W_rank_R.pt here; give the folder `actor` of a checkpoint")
    if len(found) > 1:
        raise ValueError(f"{folder}: shards of several world sizes {sorted(found)}; keep those of one")
    ((world, by_rank),) = found.items()
    missing = sorted(set(range(world)) - set(by_rank))
    if missing or len(by_rank) != world:
        raise ValueError(f"{folder}: {world} shards were saved, but ranks {missing} are missing")
    return [by_rank[rank] for rank in range(world)]


def load_shard(path: Path) -> dict[str, Tensor]:
    """One rank's tensors on the CPU, mapped from the file. Raises ValueError naming the file when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path}: damaged: {damaged} does not have its checksum")
        with torch.serialization.safe_globals(_allowed()):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read as a shard: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return state


def _allowed() -> list[Any]:
    """What a shard may hold beside tensors. Leaving `safe_globals` forbids what it was given, so only new ones."""
    already = torch.serialization.get_safe_globals()
    wanted = [*_CLASSES, *((kind, name) for name, kind in _OLD_PLACES.items())]
    return [entry for entry in wanted if entry not in already]


@dataclass(frozen=True)
class _Piece:
    """What one rank holds of a tensor; `mesh` is the grid of ranks, None for a tensor that is not sharded."""

    local: Tensor
    mesh: Tensor | None
    placements: tuple[Any, ...]
    shape: torch.Size


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The full tensor from the parts of all ranks, in rank order. Raises ValueError naming the tensor."""
    pieces = [_piece(name, part) for part in parts]
    first = pieces[0]
    for rank, piece in enumerate(pieces):
        same = piece.placements == first.placements and piece.shape == first.shape
        if not same or (piece.mesh is None) != (first.mesh is None):
            raise ValueError(
                f"{name}: rank {rank} says {piece.placements} of {tuple(piece.shape)}, rank 0 says {first.placements} "
                f"of {tuple(first.shape)}"
            )
    if first.mesh is None:
        return _equal(name, [piece.local for piece in pieces])
    if sorted(first.mesh.flatten().tolist()) != list(range(len(parts))):
        raise ValueError(f"{name}: its mesh has the ranks {first.mesh.tolist()}, but there are {len(parts)} shards")
    full = _join(name, first.mesh, first.placements, [piece.local for piece in pieces])
    if full.shape != first.shape:
        raise ValueError(f"{name}: the shards make {tuple(full.shape)}, but {tuple(first.shape)} was saved")
    return full


def _piece(name: str, part: Tensor) -> _Piece:
    if not isinstance(part, DTensor):
        return _Piece(part, None, (), part.shape)
    spec = part._spec
    mesh = vars(spec.mesh).get("mesh")  # torch 2.6; today it is a property, made from what 2.6 did not store
    mesh = spec.mesh.mesh if mesh is None else mesh
    for placement in spec.placements:
        if not (type(placement) is Shard or placement.is_replicate()):
            raise ValueError(f"{name}: the placement {placement} is not supported, only Shard and Replicate")
    return _Piece(part._local_tensor, mesh, tuple(spec.placements), spec.tensor_meta.shape)


def _join(name: str, ranks: Tensor, placements: Sequence[Any], local: Sequence[Tensor]) -> Tensor:
    """The tensor that the grid `ranks` holds; its first dimension is placed by `placements[0]`."""
    if not placements:
        return local[int(ranks)]
    parts = [_join(name, inner, placements[1:], local) for inner in ranks]
    if isinstance(placements[0], Shard):
        # A rank beyond the last row holds an empty piece.
        return torch.cat([part for part in parts if part.numel()] or parts[:1], dim=placements[0].dim)
    return _equal(name, parts)


def _equal(name: str, copies: Sequence[Tensor]) -> Tensor:
    for copy in copies[1:]:
        if not torch.equal(copy, copies[0]):
            raise ValueError(f"{name}: ranks that should hold the same values differ; the shards are not of one save")
    return copies[0]


def merge_shards(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All full tensors of a folder, floating-point ones in `dtype`. Raises ValueError naming file or tensor."""
    paths = find_shards(folder)
    shards: list[Mapping[str, Tensor]] = [load_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{path}: not the tensors of rank 0; on one side only: {different[:5]}")
    merged = {}
    for name in shards[0]:
        full = merge(name, [shard[name] for shard in shards])
        merged[name] = full.to(dtype) if full.is_floating_point() else full.clone()
    return merged
