"""The judge of the packed forward: plain transformers, one padded row per answer, a mask, nothing shared.

It uses no code of the package beyond the boundary types, so that the two cannot be wrong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from verl.protocol import TrainGroup


class PaddedReference:
    """Log-probs and entropies of every response token, in the order group, answer, token."""

    def __init__(self, folder: Path, banned: Sequence[int]) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.banned = list(banned)

    def __call__(
        self, groups: Sequence[TrainGroup], images: Mapping[str, Tensor], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and (N,) entropies; `images` maps a key to its patches."""
        rows = [(g.prompt, [*g.prompt.token_ids.tolist(), *s.token_ids.tolist()]) for g in groups for s in g.samples]
        longest = max(len(ids) for _, ids in rows)
        padding = self.model.config.text_config.pad_token_id
        ids = torch.tensor([row + [padding] * (longest - len(row)) for _, row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for _, row in rows])
        pictures: dict[str, Tensor] = {}
        if any(prompt.image_keys for prompt, _ in rows):
            pictures["pixel_values"] = torch.cat([images[key] for prompt, _ in rows for key in prompt.image_keys])
            pictures["image_grid_thw"] = torch.tensor([grid for prompt, _ in rows for grid in prompt.image_grids])
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            use_cache=False,
            **pictures,
        ).logits
        logits = logits / temperature
        logits[..., self.banned] = -torch.inf
        every = logits.log_softmax(-1)
        log_probs, entropies = [], []
        for row, (prompt, tokens) in enumerate(rows):
            start = len(prompt.token_ids)
            predictions = every[row, start - 1 : len(tokens) - 1]
            log_probs.append(predictions.gather(-1, ids[row, start : len(tokens), None])[:, 0])
            allowed = [i for i in range(predictions.shape[-1]) if i not in set(self.banned)]
            entropies.append(torch.distributions.Categorical(logits=predictions[:, allowed]).entropy())
        return torch.cat(log_probs), torch.cat(entropies)
