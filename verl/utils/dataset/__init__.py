"""Parquet rows to prompts; images to pixels, decoded once."""
