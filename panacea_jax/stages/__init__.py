"""One file a command: each reads a configuration and a work directory, and leaves a folder in it."""
