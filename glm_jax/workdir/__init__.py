"""What a run leaves on disk: each file's writer beside its reader."""
