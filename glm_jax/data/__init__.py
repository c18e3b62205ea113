"""From text to batches: corpora, tokenizers, blanks, mixture, packing. Only numpy and grain, no jax arrays."""
