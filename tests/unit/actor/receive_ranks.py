"""What the ranks of the loading tests run: build a policy as a worker does, and say what it took and what it holds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from verl.config import load
from verl.models.policy import Policy
from verl.workers.actor.build import build_policy
from verl.workers.runtime import node_leader_first


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """Full parameters and all buffers, by name."""
    found = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in found.items()}


def tied(policy: Policy) -> bool:
    return policy.hf.lm_head.weight is policy.hf.model.language_model.embed_tokens.weight


def _memory(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def build_rank(rank: int, world: int, model: str, out: str, trained: bool) -> None:
    """Writes `{rank}.pt`: the tensors, whether the head is tied, and by how many bytes memory grew at most."""
    folder = Path(model)
    config = load("ppo_trainer", ["actor_rollout_ref.rollout.n=2", *_needed()]).actor_rollout_ref
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    policy = build_policy(
        folder, tokenizer, config.model, config.actor.fsdp_config, device="cpu", trained=trained, freeze_vision=True
    )
    grown = _memory("VmHWM") - before
    held = tensors(policy)
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    torch.save({"tensors": held, "tied": tied(policy), "grown": grown, "trainable": trainable}, f"{out}/{rank}.pt")


def every_rank(rank: int, world: int, large: str, small: str, out: str) -> None:
    """All of it in one start of the ranks, which costs more than the rest."""
    for name in ("trained", "frozen"):
        Path(f"{out}/{name}").mkdir(exist_ok=True)
    dist.barrier()
    build_rank(rank, world, large, f"{out}/trained", True)
    build_rank(rank, world, small, f"{out}/frozen", False)
    leader_rank(rank, world, out)


def _needed() -> list[str]:
    return [
        "data.train_batch_size=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.fsdp_config.reshard_after_forward=True",
    ]


def leader_rank(rank: int, world: int, out: str) -> None:
    """Every rank appends its number; the leader takes its time."""
    os.environ["LOCAL_RANK"] = str(rank)
    with node_leader_first():
        time.sleep(0.5 if rank == 0 else 0.0)
        with open(f"{out}/order", "a") as file:
            file.write(str(rank))
    dist.barrier()
