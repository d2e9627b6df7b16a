"""Rules that span keys: the message names the key to change. And keys without effect: one warning each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from config_cases import ppo, sft, small

from verl.config import load
from verl.config.checks import check_ppo, check_sft
from verl.config.inert import inert_generation, inert_ppo

A, R = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
C = "algorithm.rollout_correction"


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The config with other values at dotted keys, past the loader and hydra."""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        config = dataclasses.replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{A}.ppo_mini_batch_size": 128}, f"lower {A}.ppo_mini_batch_size"),
        ({f"{A}.ppo_mini_batch_size": 24}, "does not divide by"),
        ({f"{A}.ppo_mini_batch_size": 2}, "less than one prompt for each of 4 ranks"),
        ({f"{A}.ppo_mini_batch_size": 0}, "must be at least 1"),
        ({f"{A}.ppo_micro_batch_size": 8}, f"keep {A}.ppo_micro_batch_size_per_gpu"),
        ({f"{A}.ppo_micro_batch_size_per_gpu": None}, f"{A}.use_dynamic_bsz=True"),
        ({f"{A}.ppo_micro_batch_size_per_gpu": 0}, "must be at least 1"),
        ({f"{A}.ppo_micro_batch_size_per_gpu": None, f"{A}.ppo_micro_batch_size": 6}, "does not divide by 4 ranks"),
        ({f"{R}.log_prob_micro_batch_size_per_gpu": None}, f"{R}.log_prob_use_dynamic_bsz=True"),
        (
            {"actor_rollout_ref.ref.log_prob_micro_batch_size": 8},
            "keep actor_rollout_ref.ref.log_prob_micro_batch_size_per",
        ),
        ({f"{A}.use_dynamic_bsz": True, f"{A}.ppo_max_token_len_per_gpu": 2047}, "raise it to at least 2048"),
        ({"data.dataloader_num_workers": -1}, "data.dataloader_num_workers=-1 must not be negative"),
        ({f"{R}.tensor_model_parallel_size": 3}, "does not divide trainer.n_gpus_per_node=4"),
        ({f"{R}.n": 1}, f"set {R}.n to at least 2"),
        ({f"{R}.n": 0}, f"{R}.n=0 must be greater than 0"),
        ({f"{R}.temperature": 0.0}, "greedy answers are all the same"),
        ({f"{R}.do_sample": False}, "greedy answers are all the same"),
        ({f"{R}.temperature": -1.0}, "must not be negative"),
        ({f"{R}.top_p": 0.9}, f"set {C}.rollout_is=token, or top_k=-1"),
        ({f"{C}.rollout_is_threshold": 0.0}, "must be greater than 0"),
        ({f"{C}.rollout_rs": "token"}, "needs rollout_rs_threshold above 1, got None"),
        ({f"{C}.rollout_is_batch_normalize": True}, "needs rollout_is"),
        ({f"{C}.bypass_mode": True, f"{C}.rollout_rs": "token", f"{C}.rollout_rs_threshold": 2.0}, "set bypass_mode=F"),
        ({f"{C}.loss_type": "reinforce"}, "needs bypass_mode=True"),
        ({f"{R}.top_k": 0}, "must be -1"),
        ({f"{R}.val_kwargs.top_p": 0.0}, f"{R}.val_kwargs.top_p"),
        ({f"{R}.response_length": 5}, "set data.max_response_length"),
        ({f"{R}.max_model_len": 100}, "at least 2048"),
        ({f"{R}.gpu_memory_utilization": 6.0}, "between 0.01 and 1"),
        ({"data.train_batch_size": 0}, "data.train_batch_size=0 must be greater than 0"),
        ({"data.val_files": ()}, "data.val_files is empty"),
        ({"data.min_pixels": 9, "data.max_pixels": 8}, "data.min_pixels=9 is more than data.max_pixels=8"),
        ({"data.test_files": ("data/../data/ctu_image/test.parquet",)}, "trainer.keep_best=False"),
        ({"algorithm.use_kl_in_reward": True}, "set one to False"),
        ({"algorithm.kl_ctrl.type": "adaptive"}, "kl_ctrl.type=adaptive needs a value above 0"),
        ({f"{A}.clip_ratio": 1.5}, f"{A}.clip_ratio=1.5 must be between 0 and 1"),
        ({f"{A}.clip_ratio_c": 1.0}, "must be above 1"),
        ({f"{A}.grad_clip": 0.0}, f"{A}.grad_clip=0.0 must be greater than 0"),
        ({f"{A}.optim.betas": (0.9, 1.0)}, "less than 1"),
        ({f"{A}.optim.lr_warmup_steps_ratio": 2.0}, "between 0 and 1"),
        ({f"{A}.fsdp_config.fsdp_size": 3}, "must be -1 or divide the 4 ranks"),
        ({f"{A}.fsdp_config.mixed_precision.buffer_dtype": "bf16"}, "buffer_dtype=bf16 must be fp32"),
        ({"trainer.resume_mode": "resume_path"}, "needs trainer.resume_from_path"),
        ({"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "x/latest"}, "must end in global_step_N"),
        ({"trainer.resume_mode": "atuo"}, "expected auto, disable, resume_path"),
        ({"trainer.experiment_name": " "}, "trainer.experiment_name is empty"),
        ({"trainer.critic_warmup": -1}, "must not be negative"),
        ({"trainer.n_gpus_per_node": 0}, "trainer.n_gpus_per_node=0 must be greater than 0"),
        ({"reward.max_failure_rate": 1.5}, "between 0 and 1"),
        ({"reward.timeout": 0.0}, "reward.timeout=0.0 must be greater than 0"),
    ],
)
def test_a_contradiction_names_the_key_to_change(changes: dict[str, Any], message: str) -> None:
    assert check_ppo(ppo().config) == []
    problems = check_ppo(changed(ppo().config, changes))
    assert any(message in problem for problem in problems), problems


def test_the_judges_key_is_looked_for_here_unless_the_cluster_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = changed(ppo().config, {"reward.judge.enable": True, "reward.judge.api_key_env": "NO_SUCH_KEY"})
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (problem,) = check_ppo(judged)
    assert problem.startswith("reward.judge.api_key_env=NO_SUCH_KEY: there is no such environment variable")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check_ppo(judged) == []
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("NO_SUCH_KEY", "sk-1")
    assert check_ppo(judged) == []


@pytest.mark.parametrize(
    "changes",
    [
        {f"{A}.ppo_micro_batch_size_per_gpu": None, f"{A}.ppo_micro_batch_size": 16},
        {f"{A}.ppo_micro_batch_size_per_gpu": None, f"{A}.use_dynamic_bsz": True},
        {"trainer.n_gpus_per_node": 3, f"{R}.tensor_model_parallel_size": 1},
        {"trainer.resume_mode": "out/global_step_20"},
        {"data.test_files": ("data/ctu_image/test.parquet",), "trainer.keep_best": False},
        {f"{A}.use_kl_loss": False, "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": None},
        {f"{A}.clip_ratio_low": 0.2, f"{A}.clip_ratio_high": 0.28},
        {f"{R}.val_kwargs.temperature": 0.0},
    ],
)
def test_what_can_run_passes(changes: dict[str, Any]) -> None:
    assert check_ppo(changed(ppo().config, changes)) == []


def test_an_evaluation_needs_no_training_sizes() -> None:
    training = {f"{R}.n": 1, f"{A}.ppo_micro_batch_size_per_gpu": None, f"{A}.ppo_mini_batch_size": 256}
    assert len(check_ppo(changed(ppo().config, training))) == 3
    assert check_ppo(changed(ppo().config, {**training, "trainer.val_only": True})) == []


def test_problems_are_reported_together() -> None:
    with pytest.raises(ValueError) as error:
        ppo(f"{R}.n=1", "reward.timeout=0", "data.max_prompt_length=0")
    assert len(str(error.value).splitlines()) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train_batch_size": 1, "trainer.n_gpus_per_node": 2}, "less than one row"),
        ({"data.max_length": 100}, "data.max_length=100 is less than data.max_prompt_length=512"),
        ({"trainer.stop_parse_failure": 0.02, "trainer.test_freq": -1}, "set trainer.test_freq=after_each_epoch"),
        ({"trainer.stop_parse_failure": 2.0}, "between 0 and 1"),
        ({"optim.clip_grad": 0.0}, "optim.clip_grad=0.0 must be greater than 0"),
        ({"trainer.max_seconds": 0.0}, "trainer.max_seconds"),
        ({"model.partial_pretrain": "hdfs://m"}, "model.partial_pretrain=hdfs://m"),
        ({"trainer.resume_mode": "resume_path"}, "needs trainer.resume_path"),
        ({"trainer.resume_path": "x/latest"}, "trainer.resume_path=x/latest must end in global_step_N"),
    ],
)
def test_an_sft_contradiction_names_the_key_to_change(changes: dict[str, Any], message: str) -> None:
    assert check_sft(sft().config) == []
    problems = check_sft(changed(sft().config, changes))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({f"{R}.name": "hf"}, f"{R}.gpu_memory_utilization", f"{R}.name=hf does not use it"),
        ({f"{R}.name": "hf"}, f"{R}.tensor_model_parallel_size", f"{R}.name=hf does not use it"),
        ({}, f"{R}.hf_batch_size", f"{R}.name=vllm does not use it"),
        ({}, f"{R}.nnodes", "hybrid_engine=True"),
        ({}, "algorithm.kl_ctrl.kl_coef", "KL is a loss term here"),
        ({f"{A}.use_kl_loss": False}, "algorithm.kl_penalty", "use_kl_in_reward=False"),
        ({f"{A}.use_kl_loss": False}, f"{A}.kl_loss_coef", "use_kl_loss=False"),
        ({f"{A}.use_kl_loss": False}, "actor_rollout_ref.ref.fsdp_config.param_offload", "no reference model"),
        ({f"{A}.use_dynamic_bsz": True}, f"{A}.ppo_micro_batch_size_per_gpu", "use_dynamic_bsz=True"),
        ({}, f"{A}.ppo_max_token_len_per_gpu", "use_dynamic_bsz=False"),
        ({}, "algorithm.gamma", "grpo"),
        ({f"{A}.clip_ratio_low": 0.1, f"{A}.clip_ratio_high": 0.3}, f"{A}.clip_ratio", "are both set"),
        ({}, f"{A}.loss_scale_factor", "loss_agg_mode=token-mean"),
        ({}, f"{A}.optim.min_lr_ratio", "warmup_style=constant"),
        ({f"{A}.optim.lr_warmup_steps": 3}, f"{A}.optim.lr_warmup_steps_ratio", "lr_warmup_steps=3"),
        ({"trainer.total_training_steps": 3}, "trainer.total_epochs", "total_training_steps=3"),
        ({"trainer.test_freq": -1}, "trainer.keep_best", "nothing is validated"),
        ({"trainer.resume_from_path": "x/global_step_1"}, "trainer.resume_from_path", "resume_mode=auto"),
        ({"actor_rollout_ref.model.use_remove_padding": False}, "actor_rollout_ref.model.use_remove_padding", "packed"),
        ({}, "actor_rollout_ref.model.target_modules", "lora_rank=0: there are no adapters"),
        ({"actor_rollout_ref.model.lora_adapter_path": "x"}, "actor_rollout_ref.model.lora_rank", "lora_adapter_path"),
        ({"actor_rollout_ref.model.lora_rank": 4}, "actor_rollout_ref.ref.fsdp_config.param_offload", "without its"),
        ({}, "custom_reward_function.name", "path is null"),
        ({"custom_reward_function.path": "r.py"}, "reward.format", "custom_reward_function.path"),
        ({"data.shuffle": False}, "data.seed", "data.shuffle=False"),
        ({f"{R}.val_kwargs.do_sample": False}, f"{R}.val_kwargs.temperature", "greedy"),
        (
            {"trainer.device": "cpu", f"{A}.fsdp_config.optimizer_offload": True},
            f"{A}.fsdp_config.optimizer_offload",
            "no other memory",
        ),
        (
            {"trainer.device": "cpu"},
            f"{A}.fsdp_config.use_torch_compile",
            "trainer.device=cpu: only what runs on CUDA is compiled",
        ),
        (
            {f"{A}.fsdp_config.param_offload": True, f"{A}.fsdp_config.optimizer_offload": True},
            f"{A}.fsdp_config.optimizer_offload",
            "on the host already",
        ),
    ],
)
def test_a_key_without_effect_is_named_only_when_the_user_set_it(
    changes: dict[str, Any], key: str, reason: str
) -> None:
    config = changed(ppo().config, changes)
    hits = [w for w in inert_ppo(config, {key: "7"}) if w.startswith(f"{key}=7 has no effect: ")]
    assert len(hits) == 1 and reason in hits[0]
    assert not any(w.startswith(key) and "no effect" in w for w in inert_ppo(config, {}))


def test_k1_as_a_loss_is_advised_against() -> None:
    assert any("use k2 or low_var_kl" in w for w in ppo(f"{A}.kl_loss_type=k1").warnings)


def test_training_rows_in_the_validation_are_pointed_out() -> None:
    assert any("rows it is trained on" in w for w in small("data.val_files=data/ctu_image/fit.parquet").warnings)


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [
        ("hf", "rollout.gpu_memory_utilization", "rollout.name=hf does not use it"),
        ("vllm", "rollout.hf_batch_size", "rollout.name=vllm does not use it"),
        ("hf", "rollout.log_prob_micro_batch_size", "nothing is trained here"),
        ("hf", "rollout.val_kwargs.temperature", "rollout.* itself says how to draw"),
        ("hf", "rollout.checkpoint_engine.checksum", "the engines read the weights from model.path"),
    ],
)
def test_a_key_without_effect_on_generation_is_named_only_when_the_user_set_it(
    name: str, key: str, reason: str
) -> None:
    overrides = ["model.path=m", "data.path=a.parquet", "data.output_path=b.parquet", f"rollout.name={name}"]
    config = load("generation", overrides)
    assert inert_generation(config, {key: "7"}) == [f"{key}=7 has no effect: {reason}"]
    assert inert_generation(config, {}) == []
