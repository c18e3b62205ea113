"""A run worked out without a device."""
