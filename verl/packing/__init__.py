"""Pure planning with numpy: shared-prefix layout, M-RoPE positions, balance over ranks and micro-batches."""
