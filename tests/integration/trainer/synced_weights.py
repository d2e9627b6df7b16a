"""Imported by a run's processes through `external_lib`: keeps what a vLLM engine was given in its last transfer.

Every engine process writes `TIMEMASTER_SYNCED`/PID.safetensors, weights by Hugging Face name, as they go to vLLM on CPU
(which packs its linear layers, so they cannot be read back from there).
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file

from verl.workers.rollout.vllm_engine import VLLMEngine

_end_update = VLLMEngine.end_update


def _kept(self: VLLMEngine) -> None:
    folder = Path(os.environ["TIMEMASTER_SYNCED"])
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in self._staged.items()}, folder / f"{os.getpid()}.safetensors")
    _end_update(self)


VLLMEngine.end_update = _kept
