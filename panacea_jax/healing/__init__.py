"""Finished weights healed: held-out records answered, a radius chosen, methods tried side by side."""
