"""Small worlds to try everything in: the miniature world, made up from scratch."""
