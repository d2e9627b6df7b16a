"""A vLLM engine in a process of its own, driven through a pipe: what its tests share on CPU and on a GPU.

The process alone has the folder of vLLM for CPU on its path, so that nothing of it reaches the other tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import patch_source
from transformers import AutoTokenizer

from verl.config import load
from verl.models.tiny import TinySize
from verl.protocol import Prompt, Response
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import open_patches
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.vllm_engine import VLLMEngine, model_facts
from verl.workers.rollout.vllm_plan import engine_arguments

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support" / "vllm_cpu"
VLLM_SIZE = TinySize(
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=128,
    vision_hidden=64,
    vision_layers=2,
    vision_mlp=128,
    max_vocabulary=400,
    context=512,
)
"""vLLM's attention on CPU takes heads of 32 and more."""
PATIENCE = 300.0  # seconds for one call, the start of an engine on a busy machine included


def vllm_path() -> str:
    """PYTHONPATH of a process that imports vLLM on CPU: the folder that the dev set-up makes, and what it needs.

    `TIMEMASTER_VLLM_CPU` names another folder. Without one the tests fail, or skip where set-up was declined.
    """
    folder = Path(os.environ.get("TIMEMASTER_VLLM_CPU", Path(sys.prefix) / "vllm-cpu"))
    if not (folder / "vllm").is_dir():
        message = f"no vLLM for CPU in {folder}: `bash scripts/setup_venv.sh dev` puts it there"
        if os.environ.get("TIMEMASTER_NO_SETUP") == "1":
            pytest.skip(message)
        pytest.fail(message)
    return os.pathsep.join([str(SUPPORT), str(ROOT), str(ROOT / "tests"), str(folder)])


class _Hosted:
    """Lives in the process."""

    def __init__(self, folder: Path, device: str, stores: Sequence[Path], stop_ids: tuple[int, ...] | None,
                 overrides: Sequence[str]) -> None:  # fmt: skip
        torch.set_num_threads(1)
        fixed = ["actor_rollout_ref.rollout.name=vllm", f"trainer.device={device}", "trainer.val_only=True"]
        config = load("ppo_trainer", [*fixed, "data.max_prompt_length=300", "data.max_response_length=200", *overrides])
        spec = ImageSpec.from_pretrained(folder)
        facts = model_facts(folder, AutoTokenizer.from_pretrained(folder))
        self.engine = VLLMEngine(
            engine_arguments(config, folder=folder, spec=spec, device=device, engines=1, waits_for_weights=False),
            open_patches(stores, spec, device) if stores else patch_source(device),
            facts if stop_ids is None else replace(facts, stop_ids=stop_ids),
            device=device,
        )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> tuple[list[list[Response]], list[tuple[int, int, Response, int]]]:
        """The answers, and every report: (prompt, answer, response, answers then still unfinished)."""
        reports: list[tuple[int, int, Response, int]] = []
        answers = self.engine.generate(
            prompts,
            sampling,
            step=step,
            on_finished=lambda p, a, r: reports.append((p, a, r, self.engine.unfinished())),
        )
        return answers, reports

    def update(self, parts: Sequence[Mapping[str, np.ndarray]], whole: bool = True) -> None:
        """An update in parts, from tensors that are overwritten as soon as each call has returned."""
        self.engine.begin_update()
        for part in parts:
            tensors = {name: torch.from_numpy(value.copy()).to(self.engine.device) for name, value in part.items()}
            self.engine.update_weights(tensors.items())
            for tensor in tensors.values():
                tensor.fill_(torch.nan)
        if whole:
            self.engine.end_update()

    def update_past(self, parts: Sequence[Mapping[str, np.ndarray]], skipped: str) -> None:
        """`update` as the engine's first, with a vLLM that passes over the weight `skipped`."""
        self.engine._found_whole = False
        (model,) = self.engine.engine.apply_model(lambda model: model)
        own = model.load_weights
        model.load_weights = lambda weights: own((name, value) for name, value in weights if name != skipped)
        try:
            self.update(parts)
        finally:
            model.load_weights = own

    def patches_held(self) -> int:
        """Tensors of patches or of an image's bytes that this process keeps, on any device."""
        self.engine.drop_caches()
        gc.collect()
        width = self.engine.patches.dim
        # Fake ones are those of compiled code and hold nothing; their sizes may be symbols.
        plain = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.device.type != "meta"]
        patches = sum(o.dim() == 2 and o.shape[1] == width and o.dtype == torch.float32 for o in plain)
        return patches + sum(o.dim() == 3 and o.shape[0] == 3 and o.dtype == torch.uint8 for o in plain)

    def finish_update(self) -> None:
        self.engine.end_update()

    def sleep(self, level: int) -> None:
        self.engine.sleep(level)

    def wake(self, tags: Sequence[str] | None) -> None:
        self.engine.wake(tags)

    def pid(self) -> int:
        return os.getpid()


def _serve(pipe: Connection, arguments: Mapping[str, Any]) -> None:
    hosted: Any = None
    while True:
        method, args = pipe.recv()
        try:
            if method == "start":
                hosted = _Hosted(**arguments)
                pipe.send((True, None))
            else:
                pipe.send((True, getattr(hosted, method)(*args)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, f"{error}\n{traceback.format_exc()}")))


class RemoteError(Exception):
    """What the engine's process raised: its kind, message and traceback."""


class Host:
    """Calls into the process; `with` ends it."""

    def __init__(self, folder: Path, *, device: str, path: str | None, stores: Sequence[Path] = (),
                 stop_ids: tuple[int, ...] | None = None, overrides: Sequence[str] = ()) -> None:  # fmt: skip
        arguments = {"folder": folder, "device": device, "stores": tuple(stores), "stop_ids": stop_ids}
        arguments["overrides"] = tuple(overrides)
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, arguments))
        with pytest.MonkeyPatch.context() as patch:
            if path is not None:
                patch.setenv("PYTHONPATH", path)  # read by the process, and by those that vLLM starts
                # Multiprocessing gives the process this list in place of what PYTHONPATH made.
                patch.setattr(sys, "path", [*sys.path, *path.split(os.pathsep)])
            patch.setenv("HF_HUB_OFFLINE", "1")
            self._process.start()
        other.close()
        try:
            self._call("start")
        except BaseException:
            self._process.kill()
            raise

    def _call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        end = time.monotonic() + PATIENCE
        while not self._pipe.poll(1.0):
            assert self._process.is_alive(), f"the engine's process ended with {self._process.exitcode} in {method}"
            assert time.monotonic() < end, f"no answer to {method} within {PATIENCE:.0f} s"
        good, value = self._pipe.recv()
        if not good:
            raise RemoteError(": ".join(value))
        return value

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args: self._call(method, *args)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
