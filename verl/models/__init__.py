"""What we change in a transformers model: attention, response log-probs, and a tiny model of the same architecture."""
