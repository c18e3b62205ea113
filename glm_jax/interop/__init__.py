"""Official checkpoints in and out, without torch: the .pt container, SAT's shards, orbax."""
