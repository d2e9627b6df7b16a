"""Shared-prefix layout: the n answers of a group share one copy of their prompt.

A group lies in the flat sequence as `prompt | answer_1 | ... | answer_n`. Attention is one varlen call whose query
segments are the prompt and each answer and whose key segment for answer i is (prompt ++ answer_i), gathered by
`key_index`. Aligned to the bottom right, causal masking is then exactly "all of the prompt, and my own past".

Legend: T flat tokens, S query segments (prompts and answers), K gathered keys, A answers, N response tokens.

Invariants
- An answer's log-probs do not depend on its siblings, nor on other groups in the batch.
- Every answer starts at (largest prompt position + 1) on all three M-RoPE axes.
- The last prompt token predicts the first token of every answer: `predict_index` names it once per answer.
- Response tokens keep their order: group by group, answer by answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl.packing.positions import image_spans, mrope_positions
from verl.protocol import TrainGroup

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch, ready to become tensors. See the module's legend."""

    token_ids: Ints
    """(T,)"""
    positions: Ints
    """(3, T)"""
    cu_seqlens_q: Ints
    """(S+1,) bounds of the query segments in the flat sequence."""
    cu_seqlens_k: Ints
    """(S+1,) bounds of the key segments in the gathered keys."""
    key_index: Ints
    """(K,) flat position of each gathered key."""
    group_bounds: Ints
    """(G+1,) bounds of the groups in the flat sequence."""
    predict_index: Ints
    """(N,) flat position whose hidden state predicts the response token."""
    targets: Ints
    """(N,) the response tokens."""
    answer_bounds: Ints
    """(A+1,) bounds of the answers among the N response tokens."""
    image_keys: tuple[str, ...]
    image_grids: tuple[tuple[int, int, int], ...]
    image_index: Ints
    """Flat positions of the image placeholders, in the order of the images' merged patches."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def key_copies(self) -> Ints:
        """(T, c) places of each flat token among the K gathered keys. See `copies_of`."""
        return copies_of(self.key_index, self.tokens)

    def predict_copies(self) -> Ints:
        """(T, c) places of each flat token among the N predicting positions. See `copies_of`."""
        return copies_of(self.predict_index, self.tokens)

    @property
    def computed_patches(self) -> int:
        return sum(t * h * w for t, h, w in self.image_grids)


def copies_of(index: Ints, rows: int) -> Ints:
    """(rows, c) the places at which each of `rows` values stands in `index` (K,), filled up with K; c is the largest
    number of places, at least 1."""
    count = np.bincount(index, minlength=rows)
    order = np.argsort(index, kind="stable")
    value = index[order]
    nth = np.arange(len(order)) - (np.cumsum(count) - count)[value]
    copies = np.full((rows, max(1, int(count.max(initial=0)))), len(order), dtype=np.int64)
    copies[value, nth] = order
    return copies


class _Builder:
    """Grows the arrays of a PackedBatch group by group."""

    def __init__(self, image_token_id: int, merge_size: int) -> None:
        self.image_token_id, self.merge_size = image_token_id, merge_size
        self.ids: list[Ints] = []
        self.positions: list[Ints] = []
        self.keys: list[Ints] = []
        self.predict: list[Ints] = []
        self.targets: list[Ints] = []
        self.image_index: list[Ints] = []
        self.image_keys: list[str] = []
        self.image_grids: list[tuple[int, int, int]] = []
        self.q_lengths: list[int] = []
        self.k_lengths: list[int] = []
        self.group_lengths: list[int] = []
        self.flat = 0

    def _segment(self, ids: Ints, positions: Ints, keys: Ints) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.keys.append(keys)
        self.q_lengths.append(len(ids))
        self.k_lengths.append(len(keys))
        self.flat += len(ids)

    def add(self, group: TrainGroup) -> None:
        prompt, start = group.prompt, self.flat
        ids = np.asarray(prompt.token_ids, dtype=np.int64)
        positions, next_position = mrope_positions(
            prompt.token_ids, prompt.image_grids, self.image_token_id, self.merge_size
        )
        for low, high in image_spans(prompt.token_ids, prompt.image_grids, self.image_token_id, self.merge_size):
            self.image_index.append(start + np.arange(low, high))
        self.image_keys.extend(prompt.image_keys)
        self.image_grids.extend(prompt.image_grids)
        prompt_keys = start + np.arange(len(ids))
        self._segment(ids, positions, prompt_keys)
        for sample in group.samples:
            answer = np.asarray(sample.token_ids, dtype=np.int64)
            assert len(answer) > 0, f"{prompt.uid}: an answer without tokens cannot be packed"
            here = self.flat + np.arange(len(answer))
            # Token j of the answer is predicted by the token before it; the first by the end of the prompt.
            self.predict.append(np.concatenate([prompt_keys[-1:], here[:-1]]))
            self.targets.append(answer)
            steps = next_position + np.arange(len(answer))
            self._segment(answer, np.broadcast_to(steps, (3, len(answer))), np.concatenate([prompt_keys, here]))
        self.group_lengths.append(self.flat - start)


def _bounds(lengths: Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _cat(parts: Sequence[Ints], axis: int = 0) -> Ints:
    return np.concatenate(parts, axis=axis) if parts else np.zeros(0, dtype=np.int64)


def pack(groups: Sequence[TrainGroup], *, image_token_id: int, merge_size: int) -> PackedBatch:
    """Lay out groups for one forward pass. A group may have no answers (a prefill).

    Raises ValueError when a prompt's placeholders and grids disagree.
    """
    assert groups, "an empty micro-batch is packed from `filler_group()`"
    builder = _Builder(image_token_id, merge_size)
    for group in groups:
        builder.add(group)
    return PackedBatch(
        token_ids=_cat(builder.ids),
        positions=_cat(builder.positions, axis=1),
        cu_seqlens_q=_bounds(builder.q_lengths),
        cu_seqlens_k=_bounds(builder.k_lengths),
        key_index=_cat(builder.keys),
        group_bounds=_bounds(builder.group_lengths),
        predict_index=_cat(builder.predict),
        targets=_cat(builder.targets),
        answer_bounds=_bounds([len(t) for t in builder.targets]),
        image_keys=tuple(builder.image_keys),
        image_grids=tuple(builder.image_grids),
        image_index=_cat(builder.image_index),
    )
