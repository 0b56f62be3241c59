"""The one configuration: every key with its default, recipes, and the checks that need no file and no device.

A recipe starts from :func:`get_config` and changes what differs. Overrides on the command line are ``--config.a.b=value``.
"""

from panacea_jax.config.attack import attack_of
from panacea_jax.config.defaults import batch_sizes, get_config, keys, stage_config
from panacea_jax.config.methods import defence_section, make_defence, part_of
from panacea_jax.config.recipes import load_recipe, recipes, require_key
from panacea_jax.config.validation import validate
from panacea_jax.config.variation import variations, varied

__all__ = [
    "attack_of",
    "batch_sizes",
    "defence_section",
    "get_config",
    "keys",
    "load_recipe",
    "make_defence",
    "part_of",
    "recipes",
    "require_key",
    "stage_config",
    "validate",
    "variations",
    "varied",
]
