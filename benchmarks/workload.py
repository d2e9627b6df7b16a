"""The workload `CTU-3B` of every benchmark: a Qwen2.5-VL-3B of random weights, prompts with one plot each, answers.

Every size is an argument, so that a small one runs the same code on a CPU. Weights and tokens are random: timings do
not depend on their values, and nothing has to be downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from verl.models.policy import VISION_TOKENS
from verl.models.tiny import CHAT_TEMPLATE, PREPROCESSOR, SPECIAL_TOKENS, TinySize, tiny_config
from verl.protocol import ImageRecord, Prompt, TrainGroup, TrainSample
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import PatchSource, StoredPatches


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen2.5-VL: `size.max_vocabulary` ids have a name in the tokenizer, `vocabulary` rows are in the matrix."""

    size: TinySize
    vocabulary: int
    full_attention_blocks: tuple[int, ...]
    rope_theta: float = 1e6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes of one step: `prompts` x `n` answers, one picture of `grid` (t, h, w) patches a prompt."""

    name: str
    model: ModelShape
    prompts: int
    n: int
    prompt_tokens: int
    """Image tokens included."""
    answer_tokens: int
    grid: tuple[int, int, int]
    mini_batch: int
    """Prompts of an optimizer step."""

    @property
    def samples(self) -> int:
        return self.prompts * self.n

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4


CTU_3B = Workload(
    name="CTU-3B",
    model=ModelShape(
        size=TinySize(
            hidden=2048,
            layers=36,
            heads=16,
            kv_heads=2,
            mlp=11008,
            vision_hidden=1280,
            vision_layers=32,
            vision_heads=16,
            vision_mlp=3420,
            max_vocabulary=151_665,
            context=128_000,
        ),
        vocabulary=151_936,
        full_attention_blocks=(7, 15, 23, 31),
    ),
    prompts=64,
    n=5,
    prompt_tokens=450,
    answer_tokens=256,
    grid=(1, 16, 42),
    mini_batch=32,
)

TINY = Workload(
    name="CTU-tiny",
    model=ModelShape(
        size=TinySize(
            hidden=64,
            layers=2,
            heads=2,  # of 32, which vLLM has a kernel for on every CPU
            kv_heads=1,
            mlp=128,
            vision_hidden=64,
            vision_layers=2,
            vision_mlp=128,
            max_vocabulary=500,
            context=1024,
        ),
        vocabulary=512,
        full_attention_blocks=(1,),
    ),
    prompts=4,
    n=3,
    prompt_tokens=60,
    answer_tokens=20,
    grid=(1, 8, 16),
    mini_batch=2,
)

WORKLOADS = {"3b": CTU_3B, "tiny": TINY}


def stand_in_tokenizer(names: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `names` ids, all with a name: bytes, numbered words that no text maps to, and Qwen's
    special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{i:06d}" for i in range(len(alphabet), names - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*alphabet, *words])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == names, f"{tokenizer.get_vocab_size()} names, not {names}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=10**6,
    )


def model_config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    config = tiny_config(shape.size, tokenizer)
    config.text_config.vocab_size = shape.vocabulary
    config.text_config.rope_parameters["rope_theta"] = shape.rope_theta
    config.vision_config.fullatt_block_indexes = list(shape.full_attention_blocks)
    return config


def ctu_3b_model(folder: Path, workload: Workload = CTU_3B, *, seed: int = 0) -> Path:
    """Write the model of a workload to `folder` as bf16 safetensors, or reuse what an earlier call wrote there.

    Weights are made on the GPU where there is one. Raises ValueError when the folder holds another model.
    """
    mark = folder / "workload.json"
    wanted = json.loads(json.dumps({**asdict(workload.model), "seed": seed}))
    if mark.is_file():
        if json.loads(mark.read_text()) != wanted:
            raise ValueError(f"{folder} holds another model than that of {workload.name}: name an empty folder")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = stand_in_tokenizer(workload.model.size.max_vocabulary)
    config = model_config(workload.model, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)
    known = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        eos_token_id=[known["<|im_end|>"], known["<|endoftext|>"]],
        pad_token_id=known["<|endoftext|>"],
        suppress_tokens=[known[token] for token in VISION_TOKENS],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    mark.write_text(json.dumps(wanted) + "\n")
    return folder


def picture(key: str, grid: tuple[int, int, int], rng: np.random.Generator) -> ImageRecord:
    """A random walk drawn on noise."""
    height, width = grid[1] * 14, grid[2] * 14
    pixels = rng.integers(200, 256, (3, height, width), dtype=np.uint8)
    walk = np.clip(height / 2 + 4 * rng.standard_normal(width).cumsum(), 0, height - 1).astype(int)
    pixels[:, walk, np.arange(width)] = 0
    return ImageRecord(key, pixels, grid)


def ctu_3b_prompts(
    count: int | None = None, workload: Workload = CTU_3B, *, seed: int = 0, device: str = "cpu"
) -> tuple[list[Prompt], PatchSource]:
    """`count` (the workload's, when None) random prompts of `prompt_tokens` tokens, and the patches of their pictures
    on `device`.

    The picture stands between its vision tokens in the middle of the text.
    """
    rng = np.random.default_rng(seed)
    special = {
        name: workload.model.size.max_vocabulary - len(SPECIAL_TOKENS) + i for i, name in enumerate(SPECIAL_TOKENS)
    }
    text = workload.prompt_tokens - workload.image_tokens - 2
    assert text > 2, f"{workload.prompt_tokens} tokens leave no text beside {workload.image_tokens} of the picture"
    prompts, store = [], {}
    for number in range(workload.prompts if count is None else count):
        words = rng.integers(0, min(special.values()), text)
        pads = [special["<|image_pad|>"]] * workload.image_tokens
        parts = (words[: text // 2], [special["<|vision_start|>"], *pads, special["<|vision_end|>"]])
        ids = np.concatenate([*parts, words[text // 2 :]]).astype(np.int32)
        key = f"plot-{number}"
        store[key] = picture(key, workload.grid, rng)
        prompts.append(Prompt(f"row-{number}", number, "ctu", ids, (key,), (workload.grid,), "A"))
    return prompts, StoredPatches(store, ImageSpec(), cache_bytes=1 << 30, device=device)


def ctu_3b_groups(
    prompts: Sequence[Prompt], workload: Workload = CTU_3B, *, with_old: bool = False, seed: int = 1
) -> list[TrainGroup]:
    """Groups of `n` random answers of `answer_tokens` tokens, ready for one optimizer step over all of them.

    Weights are token-mean over these groups; the reference's (and with `with_old` the old policy's) log-probs are
    random around those of a uniform distribution.
    """
    rng = np.random.default_rng(seed)
    names, length = workload.model.size.max_vocabulary - len(SPECIAL_TOKENS), workload.answer_tokens
    weight = 1.0 / (len(prompts) * workload.n * length)

    def column() -> np.ndarray:
        return rng.normal(-np.log(names), 0.1, length).astype(np.float32)

    def sample(index: int) -> TrainSample:
        return TrainSample(
            index=index,
            token_ids=rng.integers(0, names, length).astype(np.int32),
            weights=np.full(length, weight, np.float32),
            advantage=float(rng.normal()),
            old_log_probs=column() if with_old else None,
            ref_log_probs=column(),
        )

    return [
        TrainGroup(prompt, tuple(sample(number * workload.n + i) for i in range(workload.n)))
        for number, prompt in enumerate(prompts)
    ]
