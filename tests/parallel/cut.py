"""The command line, but that every adapter is cut as its matrices are, however small it is."""

from panacea_jax import cli
from panacea_jax.parallel import sharding

if __name__ == "__main__":
    sharding.ADAPTER_SPLIT_FROM = 0
    cli.main()
