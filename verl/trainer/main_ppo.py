"""`python3 -m verl.trainer.main_ppo key=value ...`: GRPO training, or one validation with `trainer.val_only=True`."""

from __future__ import annotations

import logging
import os
import sys
import traceback

from verl.config import load
from verl.config.cli import overrides_from


def main(overrides: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake in the config or data, 1 for anything else."""
    level = os.environ.get("VERL_PPO_LOGGING_LEVEL", "WARN")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        arguments = overrides_from("ppo_trainer", sys.argv[1:] if overrides is None else overrides)
        if arguments is None:
            return 0
        config = load("ppo_trainer", arguments)
        # Imported late: a mistake in the config is answered in a second, before torch and ray are loaded.
        from verl.single_controller.cluster import ClusterError
        from verl.single_controller.group import UserError, WorkerDiedError
        from verl.single_controller.shared import NotSharedError
        from verl.trainer.ray_trainer import Trainer
        from verl.workers.reward_manager import RewardFailureRateError

        trainer = Trainer(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.fit()
    except ValueError as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ClusterError, NotSharedError, RewardFailureRateError, WorkerDiedError) as error:  # the message says it all
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
