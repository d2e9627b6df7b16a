"""The parts of one RL step, kept out of the loop: batches, worker groups, validation, metrics, data."""
