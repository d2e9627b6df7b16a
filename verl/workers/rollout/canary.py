"""The canary: one real prompt answered by the rollout engine, and the log-probs of those tokens by other ways.

Engine and actor must mean the same distribution, or every importance ratio is wrong. At the start three ways are
compared (engine, packed actor, plain Hugging Face), later two: the engine must hold the weights that the actor sent.

Invariants
- On CPU, where all compute in fp32, no log-prob of engine and actor is further apart than 1e-3.
- On a GPU the yardstick is what bf16 itself does to the plain model: its mean distance to fp32 on the same tokens.
  More than twice that is a warning, more than four times refuses the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.models.policy import model_config
from verl.protocol import LogProbs, Prompt, TokenIds
from verl.utils.dataset.patches import PatchSource

TOKENS = 64
"""Longest canary answer."""
CPU_WORST = 1e-3
_WARN, _REFUSE = 2.0, 4.0


@dataclass(frozen=True)
class Apart:
    """Distance of two ways to compute the same log-probs."""

    worst: float
    mean: float

    @classmethod
    def of(cls, one: LogProbs, other: LogProbs) -> Apart:
        assert len(one) == len(other) > 0, f"{len(one)} and {len(other)} log-probs"
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
        return cls(float(difference.max()), float(difference.mean()))

    @classmethod
    def worst_of(cls, parts: Sequence[Apart]) -> Apart:
        """The largest of each distance, whichever engine it is of."""
        return cls(max(part.worst for part in parts), max(part.mean for part in parts))

    def __str__(self) -> str:
        return f"worst {self.worst:.2g}, mean {self.mean:.2g}"


class CanaryError(RuntimeError):
    """Engine and actor do not mean the same distribution."""


def judge(apart: Apart, yardstick: Apart | None, where: str) -> str | None:
    """A warning, or None. `yardstick`: plain bf16 to plain fp32 on these tokens; None on CPU. Raises CanaryError.

    A distance that is not a number is refused.
    """
    if yardstick is None:
        if not apart.worst <= CPU_WORST:
            raise CanaryError(
                f"canary {where}: log-probs of the rollout engine and of the actor are apart ({apart}); "
                f"in fp32 at most {CPU_WORST} is allowed"
            )
        return None
    ratio = apart.mean / max(yardstick.mean, 1e-6)
    line = f"canary {where}: engine to actor {apart}; bf16 to fp32 of the plain model {yardstick}: {ratio:.1f} times"
    if not ratio <= _REFUSE:
        raise CanaryError(f"{line}, more than {_REFUSE:g} times is refused")
    return f"{line}, more than {_WARN:g} times is suspicious" if ratio > _WARN else None


def plain_log_probs(
    folder: Path,
    prompt: Prompt,
    answer: TokenIds,
    patches: PatchSource,
    *,
    banned: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
    device: str,
    overrides: Mapping[str, Any] | None = None,
) -> LogProbs:
    """(R,) by the model library's own forward of one unpadded row; nothing of it is ours but the banned ids."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, config=model_config(folder, overrides), dtype=dtype, attn_implementation="sdpa"
    ).to(device)
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, answer]).astype(np.int64))[None].to(device)
    images: dict[str, torch.Tensor] = {}
    if prompt.image_keys:
        pixels = patches(prompt.image_keys)
        assert pixels is not None
        images = {
            "pixel_values": pixels.to(device),
            "image_grid_thw": torch.tensor(prompt.image_grids, device=device),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    start = len(prompt.token_ids)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images).logits
        logits = logits[0, start - 1 : -1].float() / temperature
        logits[:, list(banned)] = -torch.inf
        found = logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
    return found.cpu().numpy()
