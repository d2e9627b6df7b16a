"""From config nodes to a sharded policy and its training engine, the same for RL and SFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl.config.nodes import ActorRolloutRefConfig, FSDPConfig, ModelConfig, OptimConfig, Switch
from verl.models.freeze import freeze
from verl.models.lora import (
    LoraSpec,
    add_adapters,
    is_adapter,
    load_adapter,
    read_spec,
    save_adapter,
    target_layers,
)
from verl.models.policy import Policy, empty_model, load_policy
from verl.utils.checkpoint.hf_export import export_huggingface, gather_full
from verl.utils.checkpoint.manager import Checkpoint
from verl.utils.checkpoint.sharded import load_optimizer, load_sharded, model_state, save_optimizer, save_sharded
from verl.utils.dataset.patches import PatchSource
from verl.utils.files import fsync_tree
from verl.workers.actor.engine import PackedRunner, ShardSpec, TrainEngine, reshard, shard
from verl.workers.actor.optim import optim_spec
from verl.workers.actor.receive import reads_from_disk, receive
from verl.workers.runtime import build_mesh, compute_dtype, dtype_of


def build_policy(
    folder: Path,
    tokenizer: Any,
    model: ModelConfig,
    fsdp: FSDPConfig,
    *,
    device: str,
    trained: bool,
    freeze_vision: bool = False,
    frozen: Sequence[str] = (),
    offload: Switch = False,
) -> Policy:
    """The sharded policy of a model folder. Collective: rank 0 reads the folder, the others receive their parts.

    Trained weights are held in `fsdp.model_dtype`, those of a frozen model and under adapters in the compute precision.
    `frozen` names parameters that are not trained by patterns. `offload` keeps the weights in host memory between uses
    (CUDA only).
    """
    lora = lora_spec(model) if trained else None
    precision = fsdp.mixed_precision
    param_dtype = compute_dtype(precision.param_dtype, device)
    policy = load_policy(
        folder,
        tokenizer,
        dtype=compute_dtype(fsdp.model_dtype, device) if trained and lora is None else param_dtype,
        checkpointing=trained and _decided(model.enable_gradient_checkpointing),
        overrides=model.override_config,
        on_meta=not reads_from_disk(),
        liger=model.use_liger,
        compiled=fsdp.use_torch_compile and device == "cuda",
    )
    buffers = dtype_of(precision.buffer_dtype)
    other = {name: b.dtype for name, b in policy.named_buffers() if b.is_floating_point() and b.dtype != buffers}
    assert not other, f"mixed_precision.buffer_dtype={precision.buffer_dtype}, but these buffers differ: {other}"
    policy.lora = lora
    policy.requires_grad_(trained)
    if trained:
        master = compute_dtype(fsdp.model_dtype, device)
        choose_trained(policy.hf, lora, dtype=master, freeze_vision=freeze_vision, frozen=frozen)
    if lora is not None and model.lora_adapter_path is not None and reads_from_disk():
        load_adapter(Path(model.lora_adapter_path), policy.hf)
    spec = shard_spec(fsdp, device, offload=offload, trained=trained)
    # fully_shard moves block by block: the whole model never stands on one device
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    return shard(policy, build_mesh(device, fsdp.fsdp_size), spec, lambda module: receive(module, place))


def choose_trained(
    hf: PreTrainedModel, lora: LoraSpec | None, *, dtype: torch.dtype, freeze_vision: bool, frozen: Sequence[str]
) -> None:
    """Add the adapters, in `dtype`, and leave `requires_grad` on for what is trained alone, in place.

    Raises ValueError for a pattern of layers or parameters that fits none.
    """
    if lora is not None:
        hf.requires_grad_(False)
        add_adapters(hf, lora, dtype=dtype)
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    freeze(hf, frozen)


def chosen_model(workers: ActorRolloutRefConfig, folder: Path) -> PreTrainedModel:
    """The actor's model without weights, with its adapters and the `requires_grad` of what is trained.

    Raises ValueError for a pattern of layers or parameters that fits none.
    """
    model, actor = empty_model(folder, workers.model.override_config), workers.actor
    lora = lora_spec(workers.model)
    choose_trained(model, lora, dtype=torch.float32, freeze_vision=actor.freeze_vision_tower, frozen=actor.freeze)
    return model


def lora_spec(model: ModelConfig) -> LoraSpec | None:
    """The adapters that a config node asks for; those of `lora_adapter_path` where it names a folder.

    Raises ValueError when the folder holds no adapter, or one of another rank than `lora_rank`.
    """
    if model.lora_adapter_path is not None:
        found = read_spec(Path(model.lora_adapter_path))
        if model.lora_rank not in (0, found.rank):
            raise ValueError(
                f"model.lora_rank={model.lora_rank}, but the adapter in {model.lora_adapter_path} has {found.rank}: "
                "leave lora_rank out, the folder decides"
            )
        return found
    if model.lora_rank == 0:
        return None
    return LoraSpec(
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules or (),
    )


def check_same_adapters(checkpoint: Checkpoint, model: ModelConfig, folder: Path, node: str) -> None:
    """Raises ValueError naming the key of `node` by which a run's adapters are not those of the checkpoint.

    `folder` is the model's. Rank, alpha and layers are compared: the same weights under another scale are another
    model.
    """
    mine = lora_spec(model)
    made = read_spec(checkpoint.adapter) if checkpoint.adapter.is_dir() else None
    anew = "or set trainer.resume_mode=disable"
    if made is None or mine is None:
        if made is not mine:
            rank, here = (0, model.lora_rank) if made is None else (made.rank, 0)
            has = "holds no adapters" if made is None else f"holds adapters of rank {rank}"
            raise ValueError(f"{checkpoint.path} {has}, this run has {node}.lora_rank={here}: set it to {rank}, {anew}")
        return
    for key, there, here in (("lora_rank", made.rank, mine.rank), ("lora_alpha", made.alpha, mine.alpha)):
        if there != here:
            was = f"{checkpoint.path} was made with {node}.{key}={there:g}"
            raise ValueError(f"{was}, this run has {here:g}: set it to {there:g}, {anew}")
    layers = target_layers(empty_model(folder, model.override_config), mine).keys()
    if other := sorted(layers ^ set(made.target_modules)):
        raise ValueError(
            f"{checkpoint.path} has adapters on {len(made.target_modules)} layers and {node}.target_modules less "
            f"exclude_modules name {len(layers)}; they differ in {', '.join(other[:3])}: set them as they were, {anew}"
        )


def shard_spec(fsdp: FSDPConfig, device: str, *, offload: Switch, trained: bool) -> ShardSpec:
    """How a config node asks for a model to be sharded; a frozen one is always resharded."""
    precision = fsdp.mixed_precision
    return ShardSpec(
        param_dtype=compute_dtype(precision.param_dtype, device),
        reduce_dtype=compute_dtype(precision.reduce_dtype, device),
        offload=_decided(offload) and device == "cuda",
        reshard_after_forward=not trained or _decided(fsdp.reshard_after_forward),
    )


def _decided(switch: Switch) -> bool:
    assert isinstance(switch, bool), f"a switch is {switch!r}: the memory plan decides it before workers are built"
    return switch


def build_runner(policy: Policy, patches: PatchSource, device: str, temperature: float) -> PackedRunner:
    return PackedRunner(policy, patches, torch.device(device), temperature)


def build_train_engine(
    runner: PackedRunner, optim: OptimConfig, fsdp: FSDPConfig, *, clip_grad: float, optimizer_steps: int
) -> TrainEngine:
    # With param_offload FSDP2 updates on the host, and the state lies there anyway.
    offload = _decided(fsdp.optimizer_offload) and not _decided(fsdp.param_offload)
    spec = optim_spec(optim, clip_grad=clip_grad, optimizer_steps=optimizer_steps)
    return TrainEngine(runner, spec, offload_optimizer=offload)


def save_engine(engine: TrainEngine, checkpoint: Checkpoint, *, source: Path, dtype: torch.dtype) -> dict[str, int]:
    """Write sharded model and optimizer and a Hugging Face copy in `dtype`; returns the engine's clock. Collective.

    Of a model with adapters: these alone, once sharded and once as peft's files, and a copy with the adapters merged.
    """
    policy = engine.policy
    save_sharded(checkpoint.model, _own_state(policy))
    save_optimizer(checkpoint.optimizer, policy.hf, engine.optimizer)
    banned = policy.banned.nonzero()[:, 0].tolist()
    export_huggingface(policy.hf, checkpoint.huggingface, source=source, dtype=dtype, suppress_tokens=banned)
    if policy.lora is not None:
        adapters = gather_full(_own_state(policy))
        if adapters:  # rank 0
            save_adapter(checkpoint.adapter, adapters, policy.lora, base=str(source))
            fsync_tree(checkpoint.adapter)
    return engine.clock()


def _own_state(policy: Policy) -> dict[str, Tensor]:
    """What a checkpoint must hold of the model: all of it, or its adapters alone; their base is the model folder."""
    state = model_state(policy.hf)
    return state if policy.lora is None else {name: value for name, value in state.items() if is_adapter(name)}


def load_engine(engine: TrainEngine, checkpoint: Checkpoint, clock: dict[str, int] | None = None) -> None:
    """Restore what `save_engine` wrote, on any number of ranks. Without `clock` the weights alone. Collective."""
    reshard(engine.policy)  # what a forward left gathered would outlive the weights it was gathered from
    load_sharded(checkpoint.model, _own_state(engine.policy))
    if clock is not None:
        load_optimizer(checkpoint.optimizer, engine.policy.hf, engine.optimizer)
        if engine.offload is not None:
            engine.offload.park()
        engine.set_clock(clock)
