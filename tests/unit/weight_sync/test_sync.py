"""Invariants of a transfer, with the real ends and the real order of calls; workers are threads.

Weights arrive bit for bit, a bucket is never written while it is read, and a failure names who failed first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from simulated import CPU, Actor, Recording, Rollout, Threads, parameters, shapes
from torch import Tensor

from verl.config import load
from verl.single_controller.group import WorkerError
from verl.trainer.ppo.cluster import Workers
from verl.workers.weight_sync.channels import MappedReceiveEnd
from verl.workers.weight_sync.sender import Transport, WeightSender
from verl.workers.weight_sync.sync import WeightSync, choose_transport

ONE_EACH, TWO_EACH = 4 << 10, 8 << 10
"""Bucket sizes in bytes that hold one or two of the matrices."""


def connected(
    transport: Transport, engines: list[Recording], *, actors: int, of: dict[str, Tensor], max_bytes: int = ONE_EACH
) -> WeightSync:
    senders = Threads("actor", [Actor(of, max_bytes=max_bytes) for _ in range(actors)])
    receivers = Threads("rollout", [Rollout(engine, shapes(of)) for engine in engines])
    return WeightSync(senders, receivers, transport)


CASES = [("mapped", 1, 1), ("mapped", 2, 2), ("broadcast", 1, 1), ("broadcast", 1, 3), ("broadcast", 2, 2)]


@pytest.mark.parametrize(("transport", "actors", "rollouts"), CASES)
@pytest.mark.parametrize("max_bytes", [ONE_EACH, TWO_EACH, 1 << 20])
def test_every_engine_receives_every_weight_bit_for_bit_in_every_transfer(
    transport: Transport, actors: int, rollouts: int, max_bytes: int
) -> None:
    of, engines = parameters(), [Recording() for _ in range(rollouts)]
    sync = connected(transport, engines, actors=actors, of=of, max_bytes=max_bytes)
    for number in range(3):
        expected = {name: value.clone() for name, value in of.items()}
        synced = sync(with_checksum=number != 1)
        assert synced.nbytes == 7 * 4096 and synced.checked == (number != 1)
        for engine in engines:
            assert list(engine.updates[number]) == list(of)
            for name, value in engine.updates[number].items():
                assert torch.equal(value, expected[name]), (number, name)
            buckets = len(sync.plan.buckets)
            assert engine.events == ["begin", *["bucket"] * buckets, "end"] * (number + 1)
        for value in of.values():
            value.add_(1.0)


def test_half_precision_is_cast_once_at_the_sender() -> None:
    of, engine = parameters(3), Recording()
    actor = Actor(of, max_bytes=ONE_EACH, dtype=torch.bfloat16)
    sync = WeightSync(Threads("actor", [actor]), Threads("rollout", [Rollout(engine, shapes(of))]), "mapped")
    assert sync(with_checksum=True).nbytes == 3 * 2048
    for name, value in engine.updates[0].items():
        assert value.dtype is torch.bfloat16 and torch.equal(value, of[name].bfloat16()), name


@pytest.mark.parametrize("transport", ["mapped", "broadcast"])
def test_a_slow_reader_is_never_overtaken(transport: Transport) -> None:
    """Each matrix holds its own number, so one that was overwritten while it waited is seen."""
    of = {f"w{i}": torch.full((32, 32), float(i)) for i in range(9)}
    slow, fast = Recording(lambda name: time.sleep(0.02)), Recording()
    connected(transport, [slow, fast], actors=2 if transport == "mapped" else 1, of=of)(with_checksum=True)
    for engine in (slow, fast):
        found = {name: value.unique().tolist() for name, value in engine.updates[0].items()}
        assert found == {f"w{i}": [float(i)] for i in range(9)}


def test_a_sender_that_does_not_wait_is_found_out_by_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same slow reader with the order of calls taken away: what the tests above would not survive."""
    monkeypatch.setattr(WeightSync, "_send_arguments", lambda self, index, check, takes: [(index, check)])
    filled = threading.Event()
    of = {f"w{i}": torch.full((32, 32), float(i)) for i in range(4)}
    engine = Recording(lambda name: filled.wait(10))
    sync = connected("mapped", [engine], actors=1, of=of)
    sent = WeightSender.send

    def send(sender: WeightSender, index: int, *rest: object) -> object:
        found = sent(sender, index, *rest)  # type: ignore[arg-type]
        if index == 3:
            filled.set()
        return found

    monkeypatch.setattr(WeightSender, "send", send)
    with pytest.raises(AssertionError, match=r"bucket 0 \(w0\) has other bits at its ends"):
        sync(with_checksum=True)


def test_the_next_bucket_is_filled_while_one_is_loaded() -> None:
    """Without a second bucket the engine would wait for a fill that cannot begin."""
    of, overlapped = parameters(4), threading.Event()
    engine = Recording(lambda name: name != "layer.0.weight" or overlapped.wait(10))
    sync = connected("mapped", [engine], actors=1, of=of)
    post = sync._actors._shells[0].worker.weights._end.post

    def posted(index: int) -> None:
        post(index)
        if index == 1:
            overlapped.set()

    sync._actors._shells[0].worker.weights._end.post = posted
    sync(with_checksum=False)
    assert overlapped.is_set()


def failing(name: str) -> Callable[[str], None]:
    def fail(seen: str) -> None:
        if seen == name:
            raise RuntimeError("no memory left")

    return fail


def test_an_engine_that_fails_is_named_with_its_rank_and_phase() -> None:
    engines = [Recording(), Recording(failing("layer.4.weight"))]
    sync = connected("mapped", engines, actors=2, of=parameters())
    with pytest.raises(WorkerError, match=r"rollout rank 1, phase 'weights.take': RuntimeError: no memory left"):
        sync(with_checksum=False)
    assert "end" not in engines[1].events, "an engine with half of the weights must not be told that they are whole"


def test_an_actor_that_fails_is_named_though_the_rollout_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = connected("mapped", [Recording(), Recording()], actors=2, of=parameters())

    def fail(index: int) -> None:
        raise RuntimeError("device lost")

    sync._actors._shells[1].worker.weights._end.post = fail
    with pytest.raises(WorkerError, match=r"actor rank 1, phase 'weights.send': RuntimeError: device lost"):
        sync(with_checksum=False)


def test_another_model_is_refused_when_the_ends_connect() -> None:
    of = parameters()
    actor = Threads("actor", [Actor(of, max_bytes=ONE_EACH)])
    rollout = Threads("rollout", [Rollout(Recording(), shapes(of) | {"layer.7.weight": (1,)})])
    with pytest.raises(ValueError, match=r"rollout rank 0, phase 'weights.connect'.*\['layer.7.weight'\]"):
        WeightSync(actor, rollout, "mapped")


def test_mapped_memory_is_the_senders_own_and_has_no_name() -> None:
    sender = WeightSender(parameters(), dtype=torch.float32, device=CPU, max_bytes=ONE_EACH)
    offer = sender.offer("mapped")
    assert offer.handle is not None and os.readlink(offer.handle.place).startswith("/memfd:timemaster-weights")
    end = MappedReceiveEnd(offer.handle, [1024] * 7, torch.float32, CPU)
    sender.send(0, False)
    assert torch.equal(end.bucket(0), parameters()["layer.0.weight"].reshape(-1))


def test_processes_that_share_a_gpu_map_and_others_broadcast() -> None:
    assert (choose_transport(colocated=True), choose_transport(colocated=False)) == ("mapped", "broadcast")


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_that_sleeps_wakes_in_stages_around_the_weights(sleeps: bool) -> None:
    """Weights first, so that they can arrive; the cache after the last of them."""
    of, engine = parameters(2), Recording()
    actors = Threads("actor", [Actor(of, max_bytes=ONE_EACH)])
    rollouts = Threads("rollout", [Rollout(engine, shapes(of))])
    small = [
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "trainer.n_gpus_per_node=1",
    ]
    config = load("ppo_trainer", [*small, f"actor_rollout_ref.rollout.free_cache_engine={sleeps}"])
    workers = Workers(actors, rollouts, ranks=1, device="cpu", config=config)
    workers.connect()
    update = ["begin", "bucket", "bucket", "end"]
    for _ in range(2):
        engine.events.clear()
        workers.rest()
        assert workers.sync(with_checksum=True)["weight_sync/bytes"] == 2 * 4096
        expected = ["sleep 2", "wake ['weights']", *update, "wake ['kv_cache']"] if sleeps else update
        assert engine.events == expected
    engine.events.clear()
    workers.sync(with_checksum=False)
    assert engine.events == update, "an engine that is awake is not woken"
