"""Sources, prompt rendering, poison mixing, deterministic order and length bucketing."""
