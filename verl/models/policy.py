"""Qwen2.5-VL as a policy: packed ids, positions and images in; log-prob and entropy of the response tokens out.

Everything happens inside this root module's forward, because FSDP2 gathers the root's parameters (among them the
vocabulary matrix, which is also the embedding) only while the root runs.

Touches transformers internals; run on transformers 5.17.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from verl.models.attention import IMPLEMENTATION, AttentionPlan, plan_for
from verl.models.gather import gather_rows
from verl.models.kernels import EAGER, Kernels, compiled_kernels
from verl.models.layers import fuse_layers, use_kernels, use_liger
from verl.models.log_probs import TokenStats, response_stats
from verl.models.lora import LoraSpec
from verl.models.transfer import pinned_to_device, to_device
from verl.models.vision import QWEN_VISION, VisionPlan, VisionShape, vision_plan
from verl.packing.layout import PackedBatch
from verl.protocol import Grid
from verl.utils.dataset.prompts import VISION_TOKENS


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch as tensors on the model's device. See `PackedBatch` for the shapes."""

    token_ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    predict_index: Tensor
    predict_copies: Tensor
    targets: Tensor
    patches: Tensor
    """(N, 3 * temporal * patch * patch); of a dummy 1x2x2 image when the batch has none."""
    vision: VisionPlan
    image_index: Tensor
    """Where the merged patches go in the flat sequence; empty when the images are a dummy."""


def make_inputs(
    batch: PackedBatch,
    patches: Tensor | None,
    patch_dim: int,
    device: torch.device,
    shape: VisionShape = QWEN_VISION,
) -> ModelInputs:
    """Tensors of a packed batch. `patches` are those of `batch.image_keys` in order, None when there are none.

    A batch without an image runs the tower on a dummy image, so that no collective depends on the data. `shape` is that
    of the model's vision tower. All that a forward reads is made here: it copies nothing from the host.
    """
    grids: tuple[Grid, ...] = batch.image_grids
    if patches is None:
        assert not grids, f"{len(grids)} images but no patches"
        patches, grids = torch.zeros(4, patch_dim), ((1, 2, 2),)

    predict = (batch.predict_index, batch.predict_copies())
    arrays = (batch.token_ids, batch.positions, *predict, batch.targets, batch.image_index)
    token_ids, positions, predict_index, predict_copies, targets, image_index = to_device(arrays, device)
    return ModelInputs(
        token_ids=token_ids,
        positions=positions,
        plan=plan_for(batch, device),
        predict_index=predict_index,
        predict_copies=predict_copies,
        targets=targets,
        patches=pinned_to_device(patches, device),
        vision=vision_plan(grids, shape, device),
        image_index=image_index,
    )


class Policy(nn.Module):
    """A Qwen2.5-VL model (`hf`) with the distribution that is sampled from: temperature and banned ids."""

    def __init__(self, hf: Qwen2_5_VLForConditionalGeneration, banned_ids: Sequence[int]) -> None:
        super().__init__()
        text = hf.config.text_config
        if text.use_sliding_window or text.attention_dropout:
            raise ValueError(
                f"use_sliding_window={text.use_sliding_window} and attention_dropout={text.attention_dropout} "
                "are not supported: set both off in the model's config.json"
            )
        self.hf = hf
        # Set after loading: at load time transformers would ask for the flash-attn package because of the name.
        for config in (hf.config, hf.config.text_config, hf.config.vision_config):
            config._attn_implementation = IMPLEMENTATION
        patch_embed_as_matmul(hf.model.visual.patch_embed)
        fuse_layers(hf)
        banned = torch.zeros(text.vocab_size, dtype=torch.bool)
        banned[list(banned_ids)] = True
        self.register_buffer("banned", banned, persistent=False)
        self.kernels = EAGER
        self.lora: LoraSpec | None = None
        """What adapters the model has, if any."""
        self.keep_gathered = False
        """Whether sharded weights stay gathered between micro-batches (see `verl.workers.actor.engine.ShardSpec`)."""

    @property
    def config(self) -> Any:
        return self.hf.config

    @property
    def vocabulary(self) -> Tensor:
        """(V, D) output matrix; the embedding itself when the head is tied."""
        return self.hf.lm_head.weight

    @property
    def vision_shape(self) -> VisionShape:
        """What `make_inputs` must know about the vision tower."""
        return VisionShape.of(self.config.vision_config)

    def embed(self, token_ids: Tensor, patches: Tensor, plan: VisionPlan, image_index: Tensor) -> Tensor:
        """(T,) ids with images scattered in -> (T, D). The tower runs once per image."""
        assert plan.shape == self.vision_shape, f"inputs made for {plan.shape}, the model has {self.vision_shape}"
        embeds = self.hf.model.language_model.embed_tokens(token_ids)
        tower = self.hf.model.visual
        # The plan says everything about the grids; the tower asks for them by name and never reads them.
        features = tower(patches.to(tower.dtype), grid_thw=None, **plan.keywords).pooler_output.to(embeds.dtype)
        if len(image_index) == 0:
            return embeds + 0.0 * features.sum()
        assert len(image_index) == len(features), f"{len(image_index)} placeholders, {len(features)} image features"
        return embeds.index_copy(0, image_index, features)

    def hidden(self, embeds: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """(T, D) embeddings at (3, T) positions -> (T, D) last hidden states."""
        return self.hf.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask={"full_attention": None},
            use_cache=False,
            plan=plan,
        ).last_hidden_state[0]

    def forward(
        self, inputs: ModelInputs, *, temperature: float, entropy_grad: bool = False, with_entropy: bool = True
    ) -> TokenStats:
        """Log-prob and entropy (N,) of every response token in the batch; no entropies without `with_entropy`."""
        embeds = self.embed(inputs.token_ids, inputs.patches, inputs.vision, inputs.image_index)
        hidden = self.hidden(embeds, inputs.positions, inputs.plan)
        return response_stats(
            gather_rows(hidden, inputs.predict_index, inputs.predict_copies),
            self.vocabulary,
            inputs.targets,
            banned=self.banned,
            temperature=temperature,
            entropy_grad=entropy_grad,
            with_entropy=with_entropy,
            kernels=self.kernels,
        )

    def use_kernels(self, kernels: Kernels) -> None:
        """Run these pointwise kernels in every layer and the head."""
        self.kernels = kernels
        use_kernels(self.hf, kernels)


def patch_embed_as_matmul(patch_embed: nn.Module) -> None:
    """The patch convolution's kernel covers its whole input, so it is one matrix product, and faster as one
    (conv3d of bf16 inputs regressed in cuDNN, pytorch#166122)."""

    def forward(patches: Tensor) -> Tensor:
        weight = patch_embed.proj.weight
        return F.linear(patches.reshape(-1, weight[0].numel()).to(weight.dtype), weight.reshape(weight.shape[0], -1))

    patch_embed.forward = forward


def banned_ids(path: Path, tokenizer: Any, vocabulary_size: int) -> list[int]:
    """Ids never drawn: vision tokens, ids beyond the tokenizer, and the checkpoint's `suppress_tokens`."""
    known = tokenizer.get_vocab()
    ids = {known[token] for token in VISION_TOKENS if token in known}
    ids |= set(range(max(known.values()) + 1, vocabulary_size))
    stored = path / "generation_config.json"
    if stored.is_file():
        ids |= set(json.loads(stored.read_text()).get("suppress_tokens") or ())
    return sorted(ids)


def stop_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the generation config's eos ids and the tokenizer's."""
    ids = {tokenizer.eos_token_id}
    stored = path / "generation_config.json"
    if stored.is_file():
        eos = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(eos if isinstance(eos, list) else [eos])
    return tuple(sorted(i for i in ids if i is not None))


def check_model_folder(path: str | Path, key: str = "actor_rollout_ref.model.path") -> Path:
    """The local folder of a model: `path` itself, or the download of a hub id such as `Qwen/Qwen2.5-VL-3B-Instruct`.

    Raises ValueError naming the config key, what is missing and what to do.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(str(path)):
        folder = _download(str(path), key)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{key}={path}: no config.json there. Give a folder with a Hugging Face model "
            "(download it first, e.g. `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIR`), or a hub id."
        )
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != "qwen2_5_vl":
        raise ValueError(f"{key}={path}: model_type {kind!r} is not supported, only 'qwen2_5_vl'")
    return folder


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder. Raises ValueError naming the folder when it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); copy tokenizer.json and tokenizer_config.json "
            "of the model it was made from there"
        ) from error


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _download(name: str, key: str) -> Path:
    """A hub model in the local cache, fetched if need be."""
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:  # the hub's own errors are OSError or ValueError
        raise ValueError(
            f"{key}={name}: neither a folder here nor a model that can be fetched ({type(error).__name__}). Without "
            "network give a folder, or fetch it first with `hf download`."
        ) from error


def model_config(path: Path, overrides: Mapping[str, Any] | None) -> Any:
    """The config of a model folder with fields of its text model replaced.

    Raises ValueError on a field that it does not have.
    """
    config = AutoConfig.from_pretrained(path)
    for name, value in (overrides or {}).items():
        if not hasattr(config.text_config, name):
            close = difflib.get_close_matches(name, config.text_config.to_dict(), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"model.override_config.{name}: the model's config has no such field{hint}")
        setattr(config.text_config, name, value)
    return config


def load_policy(
    path: Path,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    checkpointing: bool = False,
    overrides: Mapping[str, Any] | None = None,
    on_meta: bool = False,
    liger: bool = False,
    compiled: bool = False,
) -> Policy:
    """The policy of a Hugging Face folder, weights in `dtype` on the CPU. Its mode does not matter: dropout is 0.

    `overrides` replaces fields of the text model's config, see `model_config`. `on_meta`: no weights are read and
    none take memory. Raises ValueError where `liger` or `compiled` kernels are asked for and cannot be used.
    """
    config = model_config(path, overrides)
    if on_meta:
        with torch.device("meta"):
            hf = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        hf.tie_weights()
    else:
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="sdpa"
        )
    policy = Policy(hf, banned_ids(path, tokenizer, hf.config.text_config.vocab_size))
    if liger:
        use_liger(hf)
    if compiled:
        policy.use_kernels(compiled_kernels())
    if checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train(checkpointing)  # transformers checkpoints only in train mode


def parameter_shapes(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight of the model in a folder, a tied head once. Reads no weights."""
    return {name: tuple(p.shape) for name, p in empty_model(path, overrides).named_parameters()}


def empty_model(path: Path, overrides: Mapping[str, Any] | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a folder without weights (meta tensors)."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(model_config(path, overrides))
