"""A Qwen2.5-VL of 1-20 M parameters, made from nothing: same architecture, a BPE tokenizer trained on given texts.

It serves the quickstart and the tests. The folder it writes is an ordinary Hugging Face model folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from verl.models.policy import VISION_TOKENS

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinySize:
    """Sizes of the tiny model: hidden / heads must be a multiple of 8 (M-RoPE sections 1:1.5:1.5) and
    vision_hidden / vision_heads of 4 (row and column angles), or it is a ValueError."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 256
    max_vocabulary: int = 512
    context: int = 4096

    def __post_init__(self) -> None:
        for name, width, heads, unit in (
            ("hidden", self.hidden, self.heads, 8),
            ("vision_hidden", self.vision_hidden, self.vision_heads, 4),
        ):
            if width % (heads * unit):
                raise ValueError(f"{name}={width} must be a multiple of {heads * unit} ({heads} heads of {unit} k)")


def train_tokenizer(texts: Sequence[str], max_vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with the Qwen special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=10**6,
    )


def tiny_config(size: TinySize, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The architecture of Qwen2.5-VL-3B (tied head, windows of 112 px, M-RoPE) at another size."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    unit = size.hidden // size.heads // 8
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.context,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [unit, unit + unit // 2, 2 * unit - unit // 2],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "fullatt_block_indexes": [i for i in range(size.vision_layers) if i % 2 == 1],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


WHITE_IS_ZERO = {"image_mean": [1.0, 1.0, 1.0], "image_std": [0.25, 0.25, 0.25]}
"""Of a model that is trained on plots from nothing: their background is then no input at all."""


def condition(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Draw every matrix anew with variance 1 / inputs, the embedding with 1 / width.

    The library's standard deviation of 0.02 is made for widths of thousands: at 128 it leaves attention nearly uniform
    and every layer a small addition to its input.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.Linear | nn.Conv3d) and module is not model.lm_head:  # the head is tied
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)


def create_tiny_model(
    folder: Path, texts: Sequence[str], *, size: TinySize | None = None, seed: int = 0, for_plots: bool = False
) -> int:
    """Write a random model and a tokenizer trained on `texts` to `folder`; returns the number of parameters.

    The same arguments write the same weights. `for_plots` makes it learn from plots faster: see `condition` and
    `WHITE_IS_ZERO`.
    """
    size = size or TinySize()
    tokenizer = train_tokenizer(texts, size.max_vocabulary)
    config = tiny_config(size, tokenizer)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    if for_plots:
        condition(model)
    torch.random.set_rng_state(state)
    folder.mkdir(parents=True, exist_ok=True)
    known = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        eos_token_id=[known["<|im_end|>"], known["<|endoftext|>"]],
        pad_token_id=known["<|endoftext|>"],
        suppress_tokens=[known[token] for token in VISION_TOKENS],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = PREPROCESSOR | (WHITE_IS_ZERO if for_plots else {})
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    about = {**asdict(size), "seed": seed, "for_plots": for_plots}
    (folder / "tiny.json").write_text(json.dumps(about, indent=2) + "\n")
    return sum(p.numel() for p in model.parameters())


def texts_of_parquet(files: Sequence[Path]) -> list[str]:
    """Prompts and answers of data files: what a tiny tokenizer is trained on."""
    import pyarrow.parquet as pq

    texts: list[str] = []
    for file in files:
        for row in pq.read_table(file).to_pylist():
            texts += [message["content"] for message in row["prompt"]]
            texts += [row["response"]] if "response" in row else []
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen2.5-VL whose tokenizer knows the given data.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="parquet files with prompts and responses")
    parser.add_argument("--hidden", type=int, default=TinySize.hidden)
    parser.add_argument("--layers", type=int, default=TinySize.layers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--for-plots", action="store_true", help="weights and image scale that learn from plots faster")
    args = parser.parse_args()
    size = TinySize(
        hidden=args.hidden,
        mlp=2 * args.hidden,
        layers=args.layers,
        vision_hidden=args.hidden,
        vision_mlp=2 * args.hidden,
        vision_layers=args.layers,
    )
    texts = texts_of_parquet(args.texts)
    count = create_tiny_model(args.output, texts, size=size, seed=args.seed, for_plots=args.for_plots)
    print(f"{args.output}: {count:,} parameters")


if __name__ == "__main__":
    main()
