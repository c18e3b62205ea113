"""Text to batches: corpora, tokenizer, blanks, mixture, packing. numpy and grain only, no jax arrays."""
