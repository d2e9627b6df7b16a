"""Shards as verl's FSDP workers write them, made in one process: the local pieces and a spec, no process group."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

NAMES = {1: ("fsdp",), 2: ("ddp", "fsdp")}


def write_shards(
    folder: Path, weights: Mapping[str, Tensor], *, grid: tuple[int, ...], old: bool = False
) -> list[Path]:
    """`model_world_size_W_rank_R.pt` for a mesh of shape `grid`: (fsdp,) or (ddp, fsdp).

    `old`: pickled as torch 2.6 does.
    """
    ranks = torch.arange(int(torch.tensor(grid).prod())).view(grid)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for rank in range(ranks.numel()):
        state = {name: _part(value, ranks, rank) for name, value in weights.items()}
        path = folder / f"model_world_size_{ranks.numel()}_rank_{rank}.pt"
        if old:
            torch.save(
                state, path, pickle_module=SimpleNamespace(__name__="pickle", Pickler=_OldPickler, dumps=pickle.dumps)
            )
        else:
            torch.save(state, path)
        paths.append(path)
    return paths


def _part(value: Tensor, ranks: Tensor, rank: int) -> DTensor:
    """The piece of a rank; FSDP cuts the first dimension like `torch.chunk`, later ranks may hold nothing."""
    shards = ranks.shape[-1]
    chunks = list(value.chunk(shards, dim=0))
    chunks += [value[:0]] * (shards - len(chunks))
    placements = (*([Replicate()] * (ranks.ndim - 1)), Shard(0))
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=NAMES[ranks.ndim], _init_backend=False, _rank=rank)
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(value.shape, value.stride(), value.dtype))
    return DTensor(chunks[rank % shards].clone(), spec, requires_grad=False)


class _OldPickler(pickle.Pickler):
    """Writes a DeviceMesh with the attributes that it had in torch 2.6."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is DeviceMesh:
            state = {
                "device_type": value.device_type,
                "mesh": value.mesh.clone(),
                "mesh_dim_names": value.mesh_dim_names,
                "_flatten_mesh_list": tuple(value.mesh.flatten().tolist()),
                "_thread_id": 1,
            }
            return copyreg.__newobj__, (DeviceMesh,), state  # type: ignore[attr-defined]
        if type(value) is DTensorSpec:
            spec = {"mesh": value.mesh, "placements": value.placements, "tensor_meta": value.tensor_meta}
            return copyreg.__newobj__, (DTensorSpec,), spec  # type: ignore[attr-defined]
        return NotImplemented
