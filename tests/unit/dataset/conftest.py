"""A small tokenizer with the Qwen tokens under two chat templates, and parquet files made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_samples import QUESTION
from transformers import PreTrainedTokenizerBase

TEXTS = [QUESTION, "<think>The level is high.</think><class>Desktop</class>", "system user assistant You are helpful."]
SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    from verl.models.tiny import train_tokenizer  # here, so that image tests can prepare an odd torchvision first

    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(params=["plain", "system"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    if request.param == "system":
        tokenizer.chat_template = SYSTEM_TEMPLATE
    return tokenizer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_rows(rows: list[dict[str, Any]], name: str = "train.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write_rows
