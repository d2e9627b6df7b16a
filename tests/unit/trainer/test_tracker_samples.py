"""Samples for trackers: the stored plot of a prompt beside its answer, as tensorboard's files hold it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from verl.protocol import Group, Prompt, Response, Score, StopReason
from verl.trainer.ppo.scoring import Scorer
from verl.utils.dataset.image_store import ImageItem, ImageStore, open_images
from verl.utils.dataset.images import ImageSpec
from verl.utils.tracking import Tracker
from verl.workers.reward_manager import RewardManager


class Letters:
    """Token id 97 is `a`."""

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in rows]


def plot(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def group(name: str, keys: tuple[str, ...], answer: str, score: Score) -> Group:
    ids = np.array([ord(c) for c in answer], np.int32)
    prompt = Prompt(name, 0, "computer_dataset", np.zeros(1, np.int32), keys, (), "Laptop", {"question": "Which?"})
    response = Response(ids, np.zeros(len(ids), np.float32), StopReason.EOS)
    return Group(prompt, (response,), (score,))


def test_a_sample_shows_the_stored_image_of_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    items = [ImageItem.of(plot(seed), where=f"row {seed}") for seed in (1, 2)]
    stores = [ImageStore.build([item], ImageSpec(), tmp_path / "cache", workers=1).path for item in items]
    images = open_images(stores)
    scorer = Scorer(RewardManager("naive", max_failure_rate=1.0), Letters(), images)
    groups = [
        group("val-0", (items[1].key,), "second", Score.ok(1.0)),
        group("val-1", (items[0].key, items[1].key), "first", Score.failed("timeout")),
        group("val-2", (), "text", Score.ok(0.5)),
    ]
    samples = scorer.tracker_samples(groups)
    assert [(s.uid, s.answer, s.score) for s in samples] == [
        ("val-0", "second", 1.0),
        ("val-1", "first", None),
        ("val-2", "text", 0.5),
    ]
    assert samples[2].image is None

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tb"))
    with Tracker(["tensorboard"], tmp_path, project="p", experiment="e", config={}) as tracker:
        tracker.log_samples(3, samples)
    events = EventAccumulator(str(tmp_path / "tb" / "p" / "e")).Reload()
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    for number, item in enumerate((items[1], items[0])):
        (event,) = events.Images(f"samples/{number}")
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 3 and np.array_equal(shown.transpose(2, 0, 1), images[item.key].pixels)
