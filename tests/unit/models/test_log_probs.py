"""Invariants of the policy's distribution: temperature, banned ids, chunks, entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from verl.models.log_probs import TokenStats, policy_logits, response_stats

N, D, V = 11, 6, 20
BANNED = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor([3, 17, 19]), True)
ALLOWED = (~BANNED).nonzero()[:, 0]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    vocabulary = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, vocabulary, ALLOWED[torch.randint(0, len(ALLOWED), (N,), generator=generator)]


def stats_and_gradients(chunk: int, *, banned: Tensor | None, entropy_grad: bool, temperature: float = 0.6):
    hidden, vocabulary, targets = inputs()
    stats = response_stats(
        hidden,
        vocabulary,
        targets,
        banned=banned,
        temperature=temperature,
        entropy_grad=entropy_grad,
        chunk=chunk,
    )
    weights = torch.linspace(0.1, 1, N)
    loss = (weights * stats.log_probs).sum()
    if entropy_grad:
        loss = loss + (weights.flip(0) * stats.entropy).sum()
    loss.backward()
    return stats, hidden.grad, vocabulary.grad


@pytest.mark.parametrize("banned", [None, BANNED], ids=["free", "banned"])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_change_neither_values_nor_gradients(chunk: int, entropy_grad: bool, banned: Tensor | None) -> None:
    whole = stats_and_gradients(N, banned=banned, entropy_grad=entropy_grad)
    cut = stats_and_gradients(chunk, banned=banned, entropy_grad=entropy_grad)
    for one, other in zip((*whole[0], *whole[1:]), (*cut[0], *cut[1:]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def oracle(
    hidden: Tensor, vocabulary: Tensor, targets: Tensor, banned: Tensor | None, temperature: float
) -> TokenStats:
    kept = ALLOWED if banned is not None else torch.arange(V)
    distribution = Categorical(logits=(hidden @ vocabulary.T)[:, kept] / temperature)
    return TokenStats(distribution.log_prob(torch.searchsorted(kept, targets)), distribution.entropy())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("banned", [None, BANNED], ids=["free", "banned"])
def test_values_and_gradients_equal_those_of_torch_distributions(temperature: float, banned: Tensor | None) -> None:
    stats, d_hidden, d_vocabulary = stats_and_gradients(4, banned=banned, entropy_grad=True, temperature=temperature)
    hidden, vocabulary, targets = inputs()
    expected = oracle(hidden, vocabulary, targets, banned, temperature)
    torch.testing.assert_close(stats.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy, expected.entropy, rtol=0, atol=1e-5)
    weights = torch.linspace(0.1, 1, N)
    ((weights * expected.log_probs).sum() + (weights.flip(0) * expected.entropy).sum()).backward()
    torch.testing.assert_close(d_hidden, hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_vocabulary, vocabulary.grad, rtol=1e-4, atol=1e-5)


def test_banned_ids_have_no_mass_and_get_no_gradient() -> None:
    stats, _, d_vocabulary = stats_and_gradients(4, banned=BANNED, entropy_grad=True)
    assert not d_vocabulary[BANNED].any() and d_vocabulary[ALLOWED].any(-1).all()
    assert stats.log_probs.isfinite().all() and stats.entropy.isfinite().all()
    hidden, vocabulary, _ = inputs()
    probs = policy_logits(hidden, vocabulary, BANNED, 0.6).softmax(-1)
    assert not probs[:, BANNED].any()
    torch.testing.assert_close(probs[:, ALLOWED].sum(-1), torch.ones(N))


def test_a_banned_target_is_minus_infinity() -> None:
    hidden, vocabulary, targets = inputs()
    targets[2] = 17
    stats = response_stats(hidden, vocabulary, targets, banned=BANNED, temperature=1.0, entropy_grad=False)
    assert stats.log_probs.isneginf().nonzero()[:, 0].tolist() == [2]


def test_the_entropy_carries_a_gradient_only_when_asked() -> None:
    for asked in (False, True):
        stats, _, _ = stats_and_gradients(4, banned=BANNED, entropy_grad=asked)
        assert stats.entropy.requires_grad is asked


def test_half_precision_hidden_states_give_fp32_statistics() -> None:
    hidden, vocabulary, targets = inputs()
    stats = response_stats(
        hidden.bfloat16(), vocabulary.bfloat16(), targets, banned=None, temperature=0.6, entropy_grad=False
    )
    assert stats.log_probs.dtype == stats.entropy.dtype == torch.float32


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_kept_for_the_backward() -> None:
    hidden, vocabulary, targets = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        response_stats(hidden, vocabulary, targets, banned=BANNED, temperature=0.6, entropy_grad=True, chunk=2)
    assert max(kept, default=0) <= max(hidden.numel(), vocabulary.numel()) < N * V, kept


def test_the_vocabularys_gradient_is_summed_over_chunks_in_fp32() -> None:
    """4096 equal rows, one a chunk: in bf16 the sum stops growing."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    vocabulary = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64)
    stats = response_stats(hidden, vocabulary, targets, banned=None, temperature=1.0, entropy_grad=False, chunk=1)
    stats.log_probs.sum().backward()
    assert vocabulary.grad.flatten().tolist() == [2048.0, -2048.0]
