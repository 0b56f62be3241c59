"""Recipes: Python files with a ``get_config(variant)``, by path, or by name those that come with the package; and JSON or YAML files of
keys and values, which run nothing."""

import ast
import contextlib
import difflib
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from panacea_jax.config.defaults import get_config, keys
from panacea_jax.errors import InputError
from panacea_jax.shipped import shipped
from panacea_jax.untrusted import parse_yaml, parsing, read_bounded, read_object

YAML = (".yaml", ".yml")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    files = shipped("configs", "recipes").glob("*.py")
    return {file.stem: file for file in sorted(files) if file.stem != "__init__"}


def load_recipe(where: str) -> ConfigDict:
    """The configuration that a recipe ``FILE[:variant]`` or ``NAME[:variant]`` makes, locked.

    A Python recipe is code and runs; one that ends in .json, .yaml or .yml is keys and values, nested or dotted, upon the defaults.

    Raises:
        InputError: no such file or name, code that fails, a configuration with keys of its own or without some of ours.
    """
    if Path(where).suffix in (".json", *YAML):
        return _from_values(where)
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


def _from_values(where: str) -> ConfigDict:
    """The default with the keys and values of a file."""
    try:
        path, config = Path(where), get_config()
        content = read_object(path, strict=True) if path.suffix == ".json" else parse_yaml(read_bounded(path), path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: not an object of keys and values")
        for key, value in _flat(content, ""):
            require_key(config, key)
            _set(config, key, value)
    except InputError as error:
        raise InputError(f"--config={where}: {error}") from error
    return config.lock()


def _flat(values: Mapping[Any, Any], section: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{section}{key}".removeprefix("config.")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _set(config: ConfigDict, key: str, value: Any) -> None:
    """Give a key a value of its own type; a number in quotes is one, as YAML reads 1e-5."""
    if key not in keys(config):
        raise InputError(f"config.{key} is a section; give its keys")
    kind = config_path.get_type(key, config)
    if isinstance(value, str) and not issubclass(str, kind):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            value = ast.literal_eval(value)
    value = _tuples(value)
    null = value is None and config_path.get_value(key, config) is not None
    if null or (value is not None and isinstance(value, bool) != (kind is bool)):
        raise InputError(f"config.{key} = {value!r:.80}: takes {kind.__name__}")
    with parsing(f"config.{key} = {value!r:.80}", f"takes {kind.__name__}"):
        config_path.set_value(key, config, value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


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
