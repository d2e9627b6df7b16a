"""`python3 -m verl.trainer.main_generation key=value ...`: answers for the rows of a parquet file, plots included.

The output is the input with a column `responses`: a list of `data.n_samples` texts a row, which main_eval scores.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.config import GenerationConfig, load
from verl.config.cli import overrides_from
from verl.config.derived import generation_engine
from verl.utils.files import fsync_path

if TYPE_CHECKING:
    from verl.utils.dataset.rl_dataset import RLDataset
    from verl.workers.rollout.base import Sampling

RESPONSES = "responses"


def generate(config: GenerationConfig) -> Path:
    """Answer every row and write the output file; returns its path. Raises ValueError on a user mistake."""
    # Imported late: a mistake in the config is answered in a second, before torch and ray are loaded.
    from transformers import AutoTokenizer

    from verl.models.policy import check_model_folder
    from verl.trainer.ppo.cluster import start_workers
    from verl.workers.rollout.forward import decode

    folder = check_model_folder(config.model.path, "model.path")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    target = _writable(Path(config.data.output_path).expanduser())
    prompts = _load_prompts(config, tokenizer, folder)
    stores = () if prompts.images is None else (prompts.images.path,)
    engine = generation_engine(config, load("ppo_trainer", ["trainer.val_only=True"]))
    workers = start_workers(engine, stores, 1, None, actors=False)
    texts: list[list[str]] = []
    try:
        for start in range(0, len(prompts), config.data.batch_size):
            part = prompts[start : start + config.data.batch_size]
            answers = workers.rollouts.generate(part, sampling_of(config), step=0)
            texts += [decode(tokenizer, of_row) for of_row in answers]
            print(f"generation: {len(texts)} of {len(prompts)} rows", flush=True)
    finally:
        workers.close()
    write_responses(config.data.path, texts, target)
    return target


def _load_prompts(config: GenerationConfig, tokenizer: Any, folder: Path) -> RLDataset:
    from verl.utils.dataset.images import ImageSpec
    from verl.utils.dataset.prompts import Truncation
    from verl.utils.dataset.rl_dataset import DatasetOptions, load_rl_dataset
    from verl.utils.dataset.rows import Columns

    data = config.data
    options = DatasetOptions(
        max_prompt_length=config.rollout.prompt_length,
        truncation=Truncation(data.truncation),
        columns=Columns(prompt=data.prompt_key, images=data.image_key, scored=False),
        cache_dir=None if data.image_cache_dir is None else Path(data.image_cache_dir),
    )
    spec = ImageSpec.from_pretrained(folder, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    return load_rl_dataset(data.path, tokenizer, spec, options)


def sampling_of(config: GenerationConfig) -> Sampling:
    """How the answers are drawn."""
    from verl.workers.rollout.base import Sampling

    rollout = config.rollout
    return Sampling(
        n=config.data.n_samples,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        do_sample=rollout.do_sample,
        max_tokens=rollout.response_length,
        max_context=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        ignore_eos=rollout.ignore_eos,
        seed=rollout.seed,
    )


def _writable(target: Path) -> Path:
    """Checked before the work, which takes long. Raises ValueError."""
    if target.is_dir():
        raise ValueError(f"data.output_path={target} is a folder; name a parquet file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def write_responses(sources: Sequence[str], texts: Sequence[Sequence[str]], target: Path) -> None:
    """The rows of `sources`, in order, with a column of texts; a column of that name gives way. Written aside first."""
    table = pa.concat_tables([pq.read_table(Path(path).expanduser()) for path in sources], promote_options="default")
    assert len(table) == len(texts), f"{len(table)} rows but {len(texts)} answered"
    if RESPONSES in table.column_names:
        table = table.drop_columns([RESPONSES])
    column = pa.array([list(of_row) for of_row in texts], pa.list_(pa.string()))
    aside = target.with_name(f".{target.name}.tmp")
    pq.write_table(_without_features(table.append_column(RESPONSES, column)), aside)
    fsync_path(aside)
    os.replace(aside, target)


def _without_features(table: pa.Table) -> pa.Table:
    """Hugging Face's list of columns would lack the new one; plain Arrow types say enough."""
    metadata = dict(table.schema.metadata or {})
    for key in (b"huggingface", b"pandas"):
        metadata.pop(key, None)
    return table.replace_schema_metadata(metadata)


def main(overrides: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake in the config or data, 1 for anything else."""
    level = os.environ.get("VERL_PPO_LOGGING_LEVEL", "WARN")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        arguments = overrides_from("generation", sys.argv[1:] if overrides is None else overrides)
        if arguments is None:
            return 0
        config = load("generation", arguments)
        # Imported late: a mistake in the config is answered in a second, before torch and ray are loaded.
        from verl.single_controller.cluster import ClusterError
        from verl.single_controller.group import WorkerDiedError
        from verl.single_controller.shared import NotSharedError

        try:
            target = generate(config)
        except (ClusterError, NotSharedError, WorkerDiedError) as error:  # the message says it all
            print(f"error: {error}", file=sys.stderr)
            return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
