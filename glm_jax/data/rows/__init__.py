"""From shards to training rows: a pure function of the row's number."""
