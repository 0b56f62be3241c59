"""``python -m panacea_jax.cli``."""

from panacea_jax.cli import main

if __name__ == "__main__":
    main()
