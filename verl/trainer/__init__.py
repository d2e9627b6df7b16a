"""Programs: `main_ppo` (RL and evaluation) and `sft_trainer`."""
