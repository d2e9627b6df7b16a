"""Rollout engine in plain torch: packed prefill, shared-prefix KV cache, exact sampler log-probs. The CPU default.

Invariants
- The sampled distribution is the policy's: logits / temperature, banned ids at minus infinity (then top-k, top-p).
- A token is a function of (seed, step, uid, answer index, token index) and the weights, whatever the batch.
- Greedy answers ignore the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from verl.models.decode import DecodePlan, PrefillPlan
from verl.models.log_probs import policy_logits
from verl.models.policy import Policy, make_inputs
from verl.packing.layout import PackedBatch, pack
from verl.protocol import Prompt, Response, StopReason, TrainGroup
from verl.utils.dataset.patches import PatchSource
from verl.workers.rollout.base import OnFinished, RolloutEngine, Sampling, answer_limits, sampling_noise


class HFEngine(RolloutEngine):
    """See the module docstring. `batch_size` bounds the sequences decoded together, or n where that is more."""

    def __init__(self, policy: Policy, patches: PatchSource, *, stop_ids: Sequence[int], batch_size: int) -> None:
        self.policy = policy
        self.patches = patches
        self.stop_ids = torch.tensor(list(stop_ids))
        self.batch_size = batch_size
        self._own: dict[str, Tensor] = {}
        self._stale: set[str] = set()  # weights that an update under way has not brought yet

    def begin_update(self) -> None:
        self._own = dict(self.policy.hf.named_parameters())
        self._stale = set(self._own)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = self._own
        assert own, "update_weights without begin_update"
        for name, value in weights:
            assert own[name].shape == value.shape, f"{name}: {tuple(own[name].shape)} here, got {tuple(value.shape)}"
            own[name].data.copy_(value)
            self._stale.discard(name)

    def end_update(self) -> None:
        missing, self._own = self._stale, {}
        assert not missing, f"{len(missing)} weights did not arrive, e.g. {sorted(missing)[:3]}"

    def sleep(self, level: int) -> None:
        """Nothing to give back: the weights are all it holds between calls."""

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Nothing to take."""

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> list[list[Response]]:
        assert not self._stale, f"{len(self._stale)} weights are old, e.g. {sorted(self._stale)[:3]}: update them first"
        together = max(1, self.batch_size // sampling.n)
        answers: list[list[Response]] = []
        for start in range(0, len(prompts), together):
            report = None if on_finished is None else _numbered_from(start, on_finished)
            answers += self._generate_chunk(prompts[start : start + together], sampling, step, report)
        return answers

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[PackedBatch, PrefillPlan, Tensor]:
        """The prompts' cache and the last hidden state of each, (G, D)."""
        config = self.policy.config
        batch = pack(
            [TrainGroup(p, ()) for p in prompts],
            image_token_id=config.image_token_id,
            merge_size=config.vision_config.spatial_merge_size,
        )
        device = self.policy.banned.device
        patches, shape = self.patches(batch.image_keys), self.policy.vision_shape
        inputs = make_inputs(batch, patches, self.patches.dim, device, shape)
        plan = PrefillPlan(inputs.plan, batch)
        embeds = self.policy.embed(inputs.token_ids, inputs.patches, inputs.vision, inputs.image_index)
        hidden = self.policy.hidden(embeds, inputs.positions, plan)
        ends = torch.from_numpy(batch.group_bounds[1:] - 1).to(device)
        return batch, plan, hidden[ends]

    def _generate_chunk(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, report: OnFinished | None
    ) -> list[list[Response]]:
        batch, prefill, last = self._prefill(prompts)
        n, device = sampling.n, last.device
        ends = batch.group_bounds[1:] - 1
        limit = answer_limits(prompts, sampling)
        position = torch.from_numpy(np.repeat(_next_positions(batch, ends), n)).to(device)
        state = _Answers(prompts, sampling, step, np.repeat(limit, n), self.stop_ids.to(device))
        cache = DecodePlan(prefill, n)
        hidden = last.repeat_interleave(n, dim=0)
        while True:
            tokens = state.draw(self._logits(hidden, sampling))
            if report is not None:
                for row, response in state.just_ended():
                    report(*divmod(row, n), response)
            alive = state.alive_groups()
            if len(alive) == 0:
                return state.responses()
            if len(alive) <= len(cache.prompt_mask) // 2:
                cache.keep(alive)
                answers = (alive[:, None] * n + torch.arange(n, device=device)).flatten()
                state.keep(answers)
                tokens, position = tokens[answers], position[answers]
            cache.advance()
            embeds = self.policy.hf.model.language_model.embed_tokens(tokens)
            hidden = self.policy.hidden(embeds, position[None].expand(3, -1), cache)
            position = position + 1

    def _logits(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        temperature = 1.0 if sampling.greedy else sampling.temperature
        logits = policy_logits(hidden, self.policy.vocabulary, self.policy.banned, temperature)
        return logits if sampling.greedy else filter_logits(logits, sampling.top_k, sampling.top_p)


def _numbered_from(start: int, on_finished: OnFinished) -> OnFinished:
    return lambda prompt, answer, response: on_finished(start + prompt, answer, response)


def _next_positions(batch: PackedBatch, ends: np.ndarray) -> np.ndarray:
    """(G,) the M-RoPE position of each group's first answer token."""
    starts = batch.group_bounds[:-1]
    return np.array([batch.positions[:, s : e + 1].max() + 1 for s, e in zip(starts, ends, strict=True)])


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) logits with everything outside top-k, then outside the smallest set of mass top-p, at minus infinity."""
    if 0 < top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


class _Answers:
    """The growing answers of one chunk: what was drawn, what has ended."""

    def __init__(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, limit: np.ndarray, stop_ids: Tensor
    ) -> None:
        self.n, self.greedy = sampling.n, sampling.greedy
        self.stop_ids = stop_ids if not sampling.ignore_eos else stop_ids[:0]
        self.groups = len(prompts)
        device = stop_ids.device
        total = len(prompts) * self.n
        self.rows = torch.arange(total, device=device)  # rows of the chunk that are still decoded
        self.limit = torch.from_numpy(limit).to(device)
        self.done = torch.zeros(total, dtype=torch.bool, device=device)
        self.step = 0
        longest = int(limit.max())
        self.ids = torch.zeros(total, longest, dtype=torch.int32, device=device)
        self.log_probs = torch.zeros(total, longest, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=device)
        self.ended = self.rows[:0]  # rows that ended in the last step
        if not self.greedy:
            noise = [
                sampling_noise(sampling.seed, step, prompt.uid, answer, longest)
                for prompt in prompts
                for answer in range(self.n)
            ]
            self.noise = torch.from_numpy(np.stack(noise)).to(device)

    def draw(self, logits: Tensor) -> Tensor:
        """One token for every row, (B,); rows that have ended draw too, unrecorded."""
        log_probs = logits.log_softmax(-1)
        if self.greedy:
            tokens = log_probs.argmax(-1)
        else:
            tokens = inverse_cdf(log_probs, self.noise[self.rows, self.step])
        alive = ~self.done[self.rows]
        rows = self.rows[alive]
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
        self.ids[rows, self.step] = tokens[alive].int()
        self.log_probs[rows, self.step] = chosen[alive].float()
        self.step += 1
        self.lengths[rows] = self.step
        stop = torch.isin(tokens[alive], self.stop_ids)
        self.stopped[rows] = stop
        self.done[rows] = stop | (self.step >= self.limit[rows])
        self.ended = rows[self.done[rows]]
        return tokens

    def just_ended(self) -> list[tuple[int, Response]]:
        """Row and answer of those that ended with the last token drawn."""
        return list(zip(self.ended.tolist(), self._responses(self.ended), strict=True))

    def alive_groups(self) -> Tensor:
        """Indices, among the groups still decoded, of those with an answer that has not ended."""
        return (~self.done[self.rows].view(-1, self.n).all(-1)).nonzero()[:, 0]

    def keep(self, answers: Tensor) -> None:
        self.rows = self.rows[answers]

    def responses(self) -> list[list[Response]]:
        """All answers, by prompt."""
        flat = self._responses(torch.arange(self.groups * self.n, device=self.ids.device))
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]

    def _responses(self, rows: Tensor) -> list[Response]:
        ids, log_probs = self.ids[rows].cpu().numpy(), self.log_probs[rows].cpu().numpy()
        return [
            Response(t[:n].copy(), p[:n].copy(), StopReason.EOS if s else StopReason.LENGTH)
            for t, p, n, s in zip(ids, log_probs, self.lengths[rows].tolist(), self.stopped[rows].tolist(), strict=True)
        ]


def inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """The id whose slice of the cumulative distribution (B, V) holds the uniform (B,), never one of mass 0."""
    cdf = log_probs.double().exp().cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)
