"""The section ``attack``."""

from ml_collections import ConfigDict

from panacea_jax.data.attacks import Attack


def attack_of(config: ConfigDict) -> Attack:
    """The attack that a configuration describes."""
    return Attack(**config.attack)
