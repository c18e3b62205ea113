"""How long a test waits before it gives up: far longer than a busy machine needs, as load must not decide a test."""

HANG = 3600  # seconds
