"""Shards to training rows: a pure function of the row's number."""
