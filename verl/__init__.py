"""TimeMaster: reinforcement learning for vision-language models that read time-series plots."""

__version__ = "0.1.0"
