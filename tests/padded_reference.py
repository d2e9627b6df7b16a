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

    def __init__(
        self,
        folder: Path,
        banned: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "eager",
        device: str = "cpu",
        checkpointing: bool = False,
    ) -> None:
        # The patch embedding is a convolution, for which cuDNN takes TF32 by default: an error of 1e-4 in the judge.
        torch.backends.cudnn.allow_tf32 = False
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).to(device)
        self.model.train(checkpointing)  # transformers checkpoints only in train mode; there is no dropout
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.device = device
        vocabulary = self.model.config.text_config.vocab_size
        self.banned = torch.tensor(sorted(banned), dtype=torch.int64, device=device)
        self.allowed = torch.tensor(sorted(set(range(vocabulary)) - set(banned)), device=device)

    def __call__(
        self,
        groups: Sequence[TrainGroup],
        images: Mapping[str, Tensor],
        temperature: float,
        *,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and (N,) entropies (empty without `with_entropy`); `images` maps a key to its patches."""
        rows = [(g.prompt, [*g.prompt.token_ids.tolist(), *s.token_ids.tolist()]) for g in groups for s in g.samples]
        longest = max(len(ids) for _, ids in rows)
        padding = self.model.config.text_config.pad_token_id
        ids = torch.tensor([row + [padding] * (longest - len(row)) for _, row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for _, row in rows], device=self.device)
        pictures: dict[str, Tensor] = {}
        if any(prompt.image_keys for prompt, _ in rows):
            patches = torch.cat([images[key] for prompt, _ in rows for key in prompt.image_keys])
            pictures["pixel_values"] = patches.to(self.device)
            grids = [grid for prompt, _ in rows for grid in prompt.image_grids]
            pictures["image_grid_thw"] = torch.tensor(grids, device=self.device)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            use_cache=False,
            **pictures,
        ).logits
        logits = logits.float() / temperature
        logits[..., self.banned] = -torch.inf
        every = logits.log_softmax(-1)
        log_probs, entropies = [], []
        for row, (prompt, tokens) in enumerate(rows):
            start = len(prompt.token_ids)
            predictions = every[row, start - 1 : len(tokens) - 1]
            log_probs.append(predictions.gather(-1, ids[row, start : len(tokens), None])[:, 0])
            if with_entropy:
                entropies.append(torch.distributions.Categorical(logits=predictions[:, self.allowed]).entropy())
        return torch.cat(log_probs), torch.cat(entropies) if with_entropy else log_probs[0].new_zeros(0)
