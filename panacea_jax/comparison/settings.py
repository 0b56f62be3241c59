"""What of a varied setting concerns which stage of a cell, so that cells share all that it does not concern."""

from panacea_jax.config import defence_section, make_defence
from panacea_jax.config.variation import WORLD, Setting, written
from panacea_jax.defences.ascent import AUTO
from panacea_jax.defences.protocol import extra_data
from panacea_jax.defences.spec import Part, Stack, slug
from panacea_jax.workdir import sha256_json

# Sets that held-out records are taken from, see ``stages.held_out``.
_CHOSEN_BY = ("harmful", "benign")
# Characters of a setting that a folder is called by.
LONGEST = 80
# The defender's sets, by the keys that say which records they hold.
_SETS = {
    "data.harmful": "harmful", "data.num_harmful": "harmful", "data.alignment": "alignment", "data.num_alignment": "alignment",
    "data.benign": "benign",
}  # fmt: skip


def folder_name(setting: Setting) -> str:
    """A folder's name for a setting; of a long one, as those that hold paths, the beginning and a hash."""
    name = slug(written(setting))
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{sha256_json(setting)[:8]}"


def of_method(method: Stack, setting: Setting, aligns: bool) -> Setting:
    """What a method can notice: not what is said of a defender's set which none of its stages reads, of heal where it
    does not, or of further fine-tuning of no steps.

    Args:
        method: stages that have a defence of their own.
        setting: of the comparison.
        aligns: whether there is an alignment stage, which reads the alignment set.
    """
    read = {"alignment"} if aligns else set()
    for part in filter(None, (method.align, method.finetune, method.heal)):
        read |= _read_by(part)
    there = setting if method.heal else _without(setting, "heal.")
    if dict(setting).get("after.steps") == 0:  # without steps there is no poison
        there = _without(there, "after.poison_ratio")
    return tuple((key, value) for key, value in there if _SETS.get(key) in (None, *read))


def of_base(setting: Setting) -> Setting:
    """What the base notices: the world that it is made in."""
    return tuple((key, value) for key, value in setting if key == WORLD)


def of_alignment(align: Part, setting: Setting) -> Setting:
    """What alignment notices: its base, and that of the sets which it reads."""
    read = {"alignment"} | _read_by(align)
    return tuple((key, value) for key, value in setting if key == WORLD or _SETS.get(key) in read)


def of_finetuning(finetune: Part, setting: Setting) -> Setting:
    """What fine-tuning notices beside its alignment: nothing that is said of later stages, or of sets that it does not read."""
    read = _read_by(finetune)
    return tuple((key, value) for key, value in _without(setting, "heal.", "after.") if _SETS.get(key) in (None, *read))


def of_healing(setting: Setting) -> Setting:
    """Likewise heal, and all before it."""
    return _without(setting, "after.")


def _without(setting: Setting, *sections: str) -> Setting:
    return tuple((key, value) for key, value in setting if not key.startswith(sections))


def _read_by(part: Part) -> set[str]:
    """The defender's sets that a method is given, or chooses its radius by."""
    method = make_defence(defence_section(part))
    return {*extra_data(method), *(_CHOSEN_BY if getattr(method, "rho", None) == AUTO else ())}
