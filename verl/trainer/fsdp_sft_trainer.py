"""verl's name for `verl.trainer.sft_trainer`; there is one program."""

from __future__ import annotations

import sys

from verl.trainer.sft_trainer import main

if __name__ == "__main__":
    sys.exit(main())
