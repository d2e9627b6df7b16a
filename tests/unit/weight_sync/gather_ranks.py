"""What the ranks of the gather test run: sharded modules whose full values every rank knows."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl.workers.runtime import build_mesh
from verl.workers.weight_sync.gather import gather_into
from verl.workers.weight_sync.sender import WeightSender


def module() -> nn.Module:
    """First dimensions that divide by the ranks, that do not, and one that is less than they are."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def gather(rank: int, world: int, fsdp_sizes: tuple[int, ...]) -> None:
    """Every parameter equals the unsharded one, cast."""
    for fsdp_size in fsdp_sizes:
        full, sharded = module(), module()
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(sharded, mesh=build_mesh("cpu", fsdp_size), mp_policy=precision)
        parameters = dict(sharded.named_parameters())
        sender = WeightSender(parameters, dtype=torch.float32, device=torch.device("cpu"), max_bytes=400)
        assert sender.plan.shapes() == {name: tuple(p.shape) for name, p in full.named_parameters()}
        with torch.no_grad():
            sharded(torch.randn(2, 5))
        # The root is not resharded after a forward: the module's own parameters are rounded now.
        assert any(p.dtype is torch.bfloat16 for p in sharded.parameters())
        for dtype in (torch.float32, torch.bfloat16):
            for name, expected in full.named_parameters():
                out = torch.full((expected.numel(),), torch.nan, dtype=dtype)
                gather_into(parameters[name], out)
                same = torch.equal(out.view(expected.shape), expected.detach().to(dtype))
                assert same, f"rank {rank}, fsdp_size {fsdp_size}: {name} in {dtype}"
