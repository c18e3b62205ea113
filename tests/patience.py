"""When a test takes what it waits for to hang: far later than a busy machine needs, as load must not decide a test."""

HANG = 3600  # seconds
