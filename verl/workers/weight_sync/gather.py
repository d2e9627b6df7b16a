"""The full value of an FSDP2 parameter, gathered straight into its place in a bucket."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# torch 2.13 renamed the function and warns of the old name; 2.11 has only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def gather_into(parameter: Tensor, out: Tensor) -> None:
    """Write the whole of `parameter`, cast, into `out` (numel,) on whatever device `out` is. Collective.

    Half precision travels as such: the cast comes before the gather. A parameter whose first dimension does not divide
    by the ranks (FSDP2 pads its shards) goes through `full_tensor`, which needs a second copy of it.
    """
    if not isinstance(parameter, DTensor):
        out.copy_(parameter.detach().reshape(-1), non_blocking=True)
        return
    shards = [dim for dim, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    assert len(shards) == 1 and parameter.placements[shards[0]].dim == 0, f"unknown sharding {parameter.placements}"
    mesh, dim = parameter.device_mesh, shards[0]
    local = parameter.to_local().detach()
    if mesh.size(dim) == 1:
        out.copy_(local.reshape(-1), non_blocking=True)
    elif parameter.shape[0] % mesh.size(dim) == 0:
        _all_gather(out, local.to(out.device, out.dtype).reshape(-1).contiguous(), group=mesh.get_group(dim))
    else:
        out.copy_(parameter.detach().to(out.dtype).full_tensor().reshape(-1), non_blocking=True)
