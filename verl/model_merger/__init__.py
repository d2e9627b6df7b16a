"""verl's sharded checkpoints to Hugging Face folders: `python3 -m verl.model_merger merge --backend fsdp ...`."""
