"""verl's shards to `DIR/huggingface`: `python scripts/model_merger.py --local_dir DIR [--hf_upload_path REPO]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verl.model_merger.__main__ import add_options, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args(arguments)
    return run(options, options.local_dir / "huggingface")


if __name__ == "__main__":
    sys.exit(main())
