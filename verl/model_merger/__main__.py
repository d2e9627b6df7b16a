"""`python3 -m verl.model_merger merge --backend fsdp --local_dir DIR --target_dir DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from verl.model_merger.folder import upload, write_folder

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both spellings of the program share."""
    parser.add_argument("--local_dir", required=True, type=Path, help="folder `actor` of a checkpoint, with the shards")
    parser.add_argument("--hf_upload_path", help="hub repository to upload the merged folder to")
    privacy = parser.add_mutually_exclusive_group()
    privacy.add_argument("--private", action="store_true", help="upload to a private repository (the default)")
    privacy.add_argument("--public", action="store_true", help="upload to a public repository")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="type of the written weights")


def run(options: argparse.Namespace, target: Path) -> int:
    """Merge into `target`, then upload where asked; exit code 0, or 2 when the shards cannot be merged."""
    try:
        write_folder(options.local_dir, target, _DTYPES[options.dtype])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"merged: {target}")
    if options.hf_upload_path:
        upload(target, options.hf_upload_path, private=not options.public)
        print(f"uploaded: {options.hf_upload_path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    parser = argparse.ArgumentParser(prog="verl.model_merger", description="verl's shards to a Hugging Face folder")
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge")
    merging.add_argument("--backend", choices=("fsdp",), default="fsdp", help="megatron checkpoints are not supported")
    merging.add_argument("--target_dir", type=Path, help="where the folder goes; default: LOCAL_DIR/huggingface")
    add_options(merging)
    options = parser.parse_args(arguments)
    return run(options, options.target_dir or options.local_dir / "huggingface")


if __name__ == "__main__":
    sys.exit(main())
