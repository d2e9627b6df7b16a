"""Engines that turn prompts into answers. One interface (`base.py`); `hf` runs everywhere."""
