"""Official checkpoints in and out, without torch: SAT's shards, Hugging Face folders, their containers, orbax."""
