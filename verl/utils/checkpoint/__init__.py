"""Checkpoints that reshard, survive a kill at any moment, and load with plain transformers."""
