"""verl's other name for `verl.trainer.main_generation`; there is one program."""

from __future__ import annotations

import sys

from verl.trainer.main_generation import main

if __name__ == "__main__":
    sys.exit(main())
