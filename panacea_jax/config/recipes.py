"""Recipes: files with a ``get_config(variant)``, by path, or by name those that come with the package."""

import difflib
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from panacea_jax.config.defaults import get_config, keys
from panacea_jax.errors import InputError
from panacea_jax.shipped import shipped


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    files = shipped("configs", "recipes").glob("*.py")
    return {file.stem: file for file in sorted(files) if file.stem != "__init__"}


def load_recipe(where: str) -> ConfigDict:
    """The configuration that a recipe ``FILE[:variant]`` or ``NAME[:variant]`` makes, locked.

    Raises:
        InputError: no such file or name, code that fails, a configuration with keys of its own or without some of ours.
    """
    path, _, variant = where.partition(":")
    file = Path(path)
    if not file.is_file():
        known = recipes()
        if path not in known:
            raise InputError(
                f"--config={where}: no such file, and no recipe of that name; known are {', '.join(known)}"
            )
        file = known[path]
    try:
        get = runpy.run_path(str(file)).get("get_config")
        config = get and (get(variant) if variant else get())
    except InputError:
        raise
    except Exception as error:  # a recipe is the user's code, which can fail in any way
        raise InputError(f"--config={where}: {type(error).__name__}: {error}") from error
    if get is None:
        raise InputError(f"--config={where}: defines no get_config()")
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"--config={where}: get_config() returned {type(config).__name__}, not a ConfigDict"
        )
    ours, theirs = set(keys(get_config())), set(keys(config))
    for wrong, rule in ((theirs - ours, "is no key of ours"), (ours - theirs, "is missing")):
        if wrong:
            raise InputError(
                f"--config={where}: config.{min(wrong)} {rule}; start from panacea_jax.config.get_config()"
            )
    return config.lock()


def require_key(config: ConfigDict, key: str) -> None:
    """Check that a dotted key names a value or a section.

    Raises:
        InputError: it does not; the nearest key is named.
    """
    known = list(keys(config))
    if key in known or any(k.startswith(f"{key}.") for k in known):
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise InputError(
        f"--config.{key}: no such key" + (f"; did you mean --config.{near[0]}?" if near else "")
    )
