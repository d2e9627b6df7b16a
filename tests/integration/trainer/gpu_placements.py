"""`main_ppo` that may place on a CPU what users may only place on GPUs: split runs, engines of several ranks."""

from __future__ import annotations

import functools
import sys

from verl.trainer import main_ppo
from verl.trainer.ppo import cluster

if __name__ == "__main__":
    cluster.plan_placement = functools.partial(cluster.plan_placement, as_on_gpus=True)
    sys.exit(main_ppo.main(sys.argv[1:]))
