"""Data sets, rewards, checkpoints, tracking and reports."""
