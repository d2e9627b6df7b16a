"""Starts gloo ranks on the loopback for a test, and what they run: a small FSDP2 model with a tied head."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from verl.utils.checkpoint.sharded import (
    load_optimizer,
    load_sharded,
    model_state,
    optimizer_state,
    save_optimizer,
    save_sharded,
)


class TinyNet(nn.Module):
    """Odd sizes for uneven shards, a bias smaller than the world, a buffer, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.narrow = nn.Linear(6, 1)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) + hidden
        return self.head(hidden) * self.scale + self.narrow(hidden)


def build(world: int, seed: int) -> tuple[TinyNet, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = TinyNet()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def full(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in state.items()}


def save_rank(rank: int, world: int, folder: str) -> None:
    model, optimizer = build(world, seed=0)
    train(model, optimizer, range(3))
    save_sharded(Path(folder) / "model", model_state(model))
    save_optimizer(Path(folder) / "optim", model, optimizer)
    saved = {"model": full(model_state(model)), "optim": full(optimizer_state(model, optimizer))}
    if rank == 0:
        torch.save(saved, Path(folder) / "expected.pt")


def load_rank(rank: int, world: int, folder: str) -> None:
    model, optimizer = build(world, seed=99 + rank)
    load_sharded(Path(folder) / "model", model_state(model))
    load_optimizer(Path(folder) / "optim", model, optimizer)
    loaded = {"model": full(model_state(model)), "optim": full(optimizer_state(model, optimizer))}
    if rank == 0:
        torch.save(loaded, Path(folder) / f"loaded_{world}.pt")
