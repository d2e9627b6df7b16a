"""Messages to token ids with expanded image placeholders, and truncation that never cuts an image.

Invariants
- The number of image tokens of a prompt is the number its grids ask for.
- A prompt's length counts after expansion.
- Truncation removes text only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.protocol import TokenIds
from verl.utils.dataset.rows import IMAGE_LITERAL, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
END_OF_TURN = "<|im_end|>"
VISION_BLOCK = VISION_START + IMAGE_PAD + VISION_END
VISION_TOKENS = (VISION_START, IMAGE_PAD, VISION_END, "<|vision_pad|>", "<|video_pad|>")


class Truncation(enum.Enum):
    """What happens to a prompt over the limit."""

    ERROR = "error"
    """Refuse it, naming the row."""
    LEFT = "left"
    """Drop its beginning."""
    RIGHT = "right"
    """Drop its end."""
    MIDDLE = "middle"
    """Keep half of the limit from each end."""


@dataclass(frozen=True)
class Tokens:
    """The ids this module needs of a Qwen-VL tokenizer. `vision` are all ids that stand for images or video."""

    image_pad: int
    vision_start: int
    vision_end: int
    eos: int
    vision: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Raises ValueError when the tokenizer lacks Qwen-VL's special tokens or a chat template."""
        known = tokenizer.get_vocab()
        needed = (IMAGE_PAD, VISION_START, VISION_END, END_OF_TURN)
        if missing := [token for token in needed if token not in known]:
            raise ValueError(f"{tokenizer.name_or_path or 'tokenizer'}: no token {missing}; a Qwen-VL model is needed")
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{tokenizer.name_or_path or 'tokenizer'}: no chat template; add chat_template.jinja to it"
            )
        return cls(
            image_pad=known[IMAGE_PAD],
            vision_start=known[VISION_START],
            vision_end=known[VISION_END],
            eos=known[END_OF_TURN],
            vision=frozenset(known[token] for token in VISION_TOKENS if token in known),
        )


def render(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> str:
    """The chat template's text up to the start of the answer, one vision block per `<image>`."""
    turns = [{**turn, "content": turn["content"].replace(IMAGE_LITERAL, VISION_BLOCK)} for turn in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **{"add_generation_prompt": True, **template_kwargs})
    assert isinstance(text, str), f"the chat template gave {type(text).__name__}, not text"
    return text


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[TokenIds]:
    """Token ids (P,) int32 of each row's prompt, one image_pad per image.

    Raises ValueError when a row's text spells vision tokens itself, or the template drops or repeats an image.
    """
    tokens = Tokens.of(tokenizer)
    texts = [render(row.messages, tokenizer, template_kwargs) for row in rows]
    encoded = [np.asarray(ids, dtype=np.int32) for ids in encode_texts(texts, tokenizer)]
    for row, ids in zip(rows, encoded, strict=True):
        pads = int((ids == tokens.image_pad).sum())
        specials = int(np.isin(ids, list(tokens.vision)).sum())
        if pads != len(row.images) or specials != 3 * len(row.images):
            raise ValueError(
                f"{row.where}: the tokenised prompt has {pads} image tokens ({specials} vision tokens) for "
                f"{len(row.images)} images; remove literal vision tokens such as {IMAGE_PAD} from its text"
            )
    return encoded


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts, as they are: no special tokens are added."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def expand_images(ids: TokenIds, counts: Sequence[int], tokens: Tokens) -> TokenIds:
    """Repeat the i-th image_pad `counts[i]` times. (P0,) -> (P,)."""
    places = np.flatnonzero(ids == tokens.image_pad)
    assert len(places) == len(counts), f"{len(places)} image tokens for {len(counts)} images"
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[places] = counts
    return np.repeat(ids, repeats)


def truncate(ids: TokenIds, limit: int, how: Truncation, tokens: Tokens, *, where: str) -> TokenIds:
    """At most `limit` of the expanded ids (P,). Raises ValueError when a token of an image block would go."""
    length = len(ids)
    if length <= limit:
        return ids
    if how is Truncation.ERROR:
        raise ValueError(f"{where}: the prompt has {length} tokens, more than data.max_prompt_length={limit}")
    kept_left = {Truncation.LEFT: 0, Truncation.RIGHT: limit, Truncation.MIDDLE: limit // 2}[how]
    dropped = slice(kept_left, length - (limit - kept_left))
    block = np.isin(ids, [tokens.vision_start, tokens.image_pad, tokens.vision_end])
    if block[dropped].any():
        raise ValueError(
            f"{where}: truncation={how.value!r} from {length} to data.max_prompt_length={limit} tokens would cut an "
            f"image ({int(block.sum())} tokens); raise the limit or set data.filter_overlong_prompts=True"
        )
    return np.delete(ids, dropped)
