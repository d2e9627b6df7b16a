"""Advantages, losses and their aggregation: one algorithm, one short file."""
