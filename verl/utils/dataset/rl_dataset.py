"""Parquet files to prompts (RL) or prompts with answers (SFT), tokenised once, images decoded once.

Invariants
- Image and token counts agree for every prompt that is handed out.
- The overlong filter counts tokens after image expansion.
- Two loads of the same files with the same settings have the same digest; a changed row changes it.
- RL and SFT rows of the same content have the same prompt ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.protocol import Prompt, TokenIds
from verl.utils.dataset.image_store import ImageItem, ImageStore
from verl.utils.dataset.images import ImageSpec, token_count
from verl.utils.dataset.prompts import Tokens, Truncation, encode, encode_texts, expand_images, truncate
from verl.utils.dataset.rows import Columns, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """How rows become prompts. Lengths are in tokens, counted after image expansion; None is no limit."""

    max_prompt_length: int | None = None
    max_total_length: int | None = None
    """SFT: limit of prompt and answer together."""
    truncation: Truncation = Truncation.ERROR
    filter_overlong_prompts: bool = False
    max_samples: int = -1
    """Only the first so many rows, before the filter; not positive is all."""
    columns: Columns = field(default_factory=Columns)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the chat template."""
    cache_dir: Path | None = None
    """Where image stores go; see `image_store.default_cache_dir`."""
    workers: int | None = None
    """Threads that decode images."""


@dataclass(frozen=True)
class RLDataset(Sequence[Prompt]):
    """Prompts in row order and the store of their images (None when no row has one)."""

    prompts: tuple[Prompt, ...]
    images: ImageStore | None
    dropped: int
    """Rows that the overlong filter removed."""
    digest: str
    """sha256 over the rows as they will be used; a resumed run compares it."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]


@dataclass(frozen=True, slots=True)
class SFTExample:
    """A prompt and its answer (R,) int32, which ends in `<|im_end|>` unless it was cut."""

    prompt: Prompt
    response_ids: TokenIds


@dataclass(frozen=True)
class SFTDataset(Sequence[SFTExample]):
    """As `RLDataset`, with answers."""

    examples: tuple[SFTExample, ...]
    images: ImageStore | None
    dropped: int
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]


def load_rl_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    spec: ImageSpec,
    options: DatasetOptions,
) -> RLDataset:
    """Read, check, tokenise. Raises ValueError naming the file and row, the value seen and the key to change."""
    if options.columns.response is not None:
        raise ValueError(f"data.response_key={options.columns.response!r} is for SFT; use load_sft_dataset")
    rows = read_rows(files, options.columns, max_samples=options.max_samples)
    prompts, images = _prompts(rows, tokenizer, spec, options)
    prompts, kept = _within_limit(prompts, rows, options, Tokens.of(tokenizer))
    prompts = [prompts[i] for i in kept]
    return RLDataset(tuple(prompts), images, len(rows) - len(kept), _digest(prompts, [b""] * len(prompts)))


def load_sft_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    spec: ImageSpec,
    options: DatasetOptions,
) -> SFTDataset:
    """As `load_rl_dataset`, with the answers of column `options.columns.response`.

    A prompt over `max_prompt_length` is treated as there, before its answer is looked at.
    A row over `max_total_length` is dropped when `filter_overlong_prompts` is set; with `truncation` right its answer
    is cut (and then has no end token); otherwise it is an error.
    """
    if options.columns.response is None:
        raise ValueError("data.response_key is not set: SFT needs the column that holds the answers")
    rows = read_rows(files, options.columns, max_samples=options.max_samples)
    tokens = Tokens.of(tokenizer)
    responses = _responses(rows, tokenizer, tokens)
    prompts, images = _prompts(rows, tokenizer, spec, options)
    prompts, fitting = _within_limit(prompts, rows, options, tokens)
    examples = [SFTExample(prompts[i], responses[i]) for i in fitting]
    kept = _examples_within_limit(examples, [rows[i] for i in fitting], options)
    digest = _digest([e.prompt for e in kept], [e.response_ids.tobytes() for e in kept])
    return SFTDataset(tuple(kept), images, len(rows) - len(kept), digest)


def _prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, spec: ImageSpec, options: DatasetOptions
) -> tuple[list[Prompt], ImageStore | None]:
    tokens = Tokens.of(tokenizer)
    encoded = encode(rows, tokenizer, options.template_kwargs)
    items = [[ImageItem.of(image, where=row.where) for image in row.images] for row in rows]
    flat = [item for row_items in items for item in row_items]
    store = ImageStore.build(flat, spec, options.cache_dir, options.workers) if flat else None
    grids = {key: record.grid for key, record in store.items()} if store is not None else {}
    prompts = []
    for row, ids, row_items in zip(rows, encoded, items, strict=True):
        row_grids = tuple(grids[item.key] for item in row_items)
        counts = [token_count(grid, spec.merge_size) for grid in row_grids]
        prompts.append(
            Prompt(
                uid=row.uid,
                row=row.number,
                data_source=row.data_source,
                token_ids=expand_images(ids, counts, tokens),
                image_keys=tuple(item.key for item in row_items),
                image_grids=row_grids,
                ground_truth=row.ground_truth,
                extra_info=row.extra_info,
            )
        )
    return prompts, store


def _within_limit(
    prompts: Sequence[Prompt], rows: Sequence[Row], options: DatasetOptions, tokens: Tokens
) -> tuple[list[Prompt], list[int]]:
    """All prompts, cut where `truncation` says so, and the positions of those that stay."""
    limit = options.max_prompt_length
    if limit is None:
        return list(prompts), list(range(len(prompts)))
    overlong = [i for i, prompt in enumerate(prompts) if len(prompt.token_ids) > limit]
    if options.filter_overlong_prompts:
        return list(prompts), _without(overlong, len(prompts), f"data.max_prompt_length={limit}")
    if overlong and options.truncation is Truncation.ERROR:
        first = overlong[0]
        longest = max(len(prompts[i].token_ids) for i in overlong)
        raise ValueError(
            f"{rows[first].where}: the prompt has {len(prompts[first].token_ids)} tokens after image expansion, more "
            f"than data.max_prompt_length={limit} ({len(overlong)} of {len(prompts)} rows do, the longest {longest}); "
            "raise it, set data.filter_overlong_prompts=True, or data.truncation=left|right|middle"
        )
    kept = list(prompts)
    for i in overlong:
        ids = truncate(prompts[i].token_ids, limit, options.truncation, tokens, where=rows[i].where)
        kept[i] = replace(prompts[i], token_ids=ids)
    return kept, list(range(len(kept)))


def _responses(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[TokenIds]:
    responses = []
    encoded = encode_texts([row.response or "" for row in rows], tokenizer)
    for row, ids in zip(rows, encoded, strict=True):
        if banned := tokens.vision.intersection(ids):
            raise ValueError(
                f"{row.where}: the answer holds vision tokens (ids {sorted(banned)}) the policy may not say"
            )
        responses.append(np.asarray([*ids, tokens.eos], dtype=np.int32))
    return responses


def _examples_within_limit(
    examples: list[SFTExample], rows: Sequence[Row], options: DatasetOptions
) -> list[SFTExample]:
    limit = options.max_total_length
    if limit is None:
        return examples
    sizes = [len(example.prompt.token_ids) + len(example.response_ids) for example in examples]
    overlong = [i for i, size in enumerate(sizes) if size > limit]
    if options.filter_overlong_prompts:
        return [examples[i] for i in _without(overlong, len(examples), f"data.max_length={limit}")]
    kept = list(examples)
    for i in overlong:
        room = limit - len(examples[i].prompt.token_ids)
        if options.truncation is not Truncation.RIGHT or room < 1:
            raise ValueError(
                f"{rows[i].where}: prompt and answer have {sizes[i]} tokens ({limit - room} are the prompt), more than "
                f"data.max_length={limit} ({len(overlong)} of {len(examples)} rows do); raise it, set "
                "data.filter_overlong_prompts=True, or data.truncation=right to cut the answer"
            )
        kept[i] = replace(examples[i], response_ids=examples[i].response_ids[:room])
    return kept


def _without(overlong: Sequence[int], count: int, limit: str) -> list[int]:
    """The other positions below `count`."""
    if overlong:
        logger.warning("dropped %d of %d rows over %s", len(overlong), count, limit)
    if len(overlong) == count:
        raise ValueError(f"all {count} rows are longer than {limit}; raise it")
    gone = set(overlong)
    return [i for i in range(count) if i not in gone]


def _digest(prompts: Iterable[Prompt], answers: Sequence[bytes]) -> str:
    total = hashlib.sha256()
    for prompt, answer in zip(prompts, answers, strict=True):
        head = [prompt.uid, prompt.data_source, prompt.ground_truth, prompt.image_keys, prompt.image_grids]
        for part in (json.dumps(head).encode(), prompt.token_ids.tobytes(), answer):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
