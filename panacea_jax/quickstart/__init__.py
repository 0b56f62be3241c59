"""The miniature world: the whole experiment, small enough for a laptop CPU."""
