"""The FSDP2 actor and its frozen reference: log-probs, updates, weights out."""
