"""What a run leaves on disk, writers beside readers."""
