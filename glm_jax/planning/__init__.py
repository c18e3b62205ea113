"""Plans of a run, made without a device."""
