"""Metrics to the console, to files and to experiment trackers."""

from verl.utils.tracking.base import Sample
from verl.utils.tracking.tracker import Tracker

__all__ = ["Sample", "Tracker"]
