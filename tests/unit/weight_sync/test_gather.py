"""Sharded parameters come out whole, on any number of ranks."""

from __future__ import annotations

import gather_ranks
import torch.distributed as dist
from gloo_ranks import on_ranks


def test_a_gathered_parameter_is_the_unsharded_one_on_one_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        gather_ranks.gather(0, 1, (-1,))
    finally:
        dist.destroy_process_group()


def test_a_gathered_parameter_is_the_unsharded_one_on_two_ranks() -> None:
    """In one shard group, where FSDP2 pads some shards, and as two replicas."""
    on_ranks(2, gather_ranks.gather, (-1, 1))
