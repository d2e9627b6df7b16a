"""Moves the actor's weights to the rollout engines, bucket by bucket.

Reading order: `buckets` (what goes where), `sync` (the driver's order of calls), `sender` and `receiver` (the two
ends), `channels` (how a bucket's bytes get across: memory that both processes map, or a broadcast).
"""
