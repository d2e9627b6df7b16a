"""Merged tensors to a Hugging Face folder, and the folder to the hub.

Invariant: files reach the target only after all of them are written and flushed; a failure leaves it as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, save_torch_state_dict
from torch import Tensor

from verl.model_merger.shards import merge_shards
from verl.utils.checkpoint.hf_export import copy_model_files
from verl.utils.files import fsync_path, fsync_tree

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def write_folder(local_dir: Path, target: Path, dtype: torch.dtype) -> None:
    """Merge the shards of `local_dir` into `target`, beside config and tokenizer from `local_dir/huggingface`.

    A checkpoint of this version has loadable weights already: they are copied when `target` is another folder.
    Raises ValueError on a missing or damaged shard, and for weights that are not those of the config's model; then
    nothing is written.
    """
    if not local_dir.is_dir():
        raise ValueError(f"{local_dir} is no folder: name the one that holds model_world_size_*_rank_*.pt")
    source = local_dir / "huggingface"
    own = sorted(source.glob("*.safetensors")) and not any(local_dir.glob("model_world_size_*"))
    if own and target.resolve() == source.resolve():
        print(f"{source} holds loadable weights already: nothing to merge")
        return
    config = _read_config(source)
    with _staged(target) as folder:
        if own:
            for path in source.iterdir():
                shutil.copyfile(path, folder / path.name)
            return
        weights = _without_tied_head(merge_shards(local_dir, dtype), config)
        if adapters := [name for name in weights if ".lora_" in name]:
            raise ValueError(
                f"{local_dir}: the shards hold an unmerged adapter ({adapters[0]}), which is not supported"
            )
        copy_model_files(source, folder)
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        _check_complete(folder, config, local_dir)


def _check_complete(folder: Path, config: dict[str, Any], local_dir: Path) -> None:
    """Raises ValueError naming weights that `config`'s model has and the folder lacks, or the other way round.

    transformers itself is asked, without loading a value: it knows the older names of its weights.
    """
    name = (config.get("architectures") or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        print(
            f"transformers {transformers.__version__} has no {name}: whether all its weights are there was not checked"
        )
        return
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # its report says what the error will say
    try:
        _, found = model_class.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        transformers.logging.set_verbosity(level)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in found[kind]):
            what = f"{len(keys)} {kind.replace('_keys', '')} weights of {name}"
            raise ValueError(
                f"{local_dir}: the shards do not hold what config.json describes: {what}: {', '.join(keys[:3])}"
            )


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing; the shards need the config and tokenizer that were saved beside them")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _without_tied_head(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A tied head is stored once, as its embedding. Raises ValueError when the two differ."""
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False))
    embedding = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
    if not tied or embedding is None or "lm_head.weight" not in weights:
        return weights
    if not torch.equal(weights["lm_head.weight"], weights[embedding]):
        raise ValueError(f"config.json ties lm_head.weight to {embedding}, but their values differ")
    return {name: value for name, value in weights.items() if name != "lm_head.weight"}


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder to write into, whose files then replace those of `target`: weights first, config.json last."""
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    aside = target / ".tmp-merge"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        fsync_tree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed:
            target.rmdir()
        raise
    written = sorted(aside.iterdir(), key=lambda path: (path.name == "config.json", path.suffix == ".json", path.name))
    stale = {path for pattern in _WEIGHTS for path in target.glob(pattern)} - {target / path.name for path in written}
    for path in written:
        os.replace(path, target / path.name)
    for path in stale:
        path.unlink()
    aside.rmdir()
    fsync_path(target)


def upload(folder: Path, repo: str, *, private: bool) -> None:
    """Upload a folder to the hub; a new repository is private unless asked otherwise. Uses the login of `hf auth`."""
    api = HfApi()
    api.create_repo(repo_id=repo, private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repo, repo_type="model")
