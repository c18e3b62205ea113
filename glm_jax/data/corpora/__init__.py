"""From files of text to tokenised shards, before any training."""
