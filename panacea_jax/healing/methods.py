"""Which methods the data at hand allows, said before any is tried."""

from collections.abc import Collection

from panacea_jax.defences import DEFENCES, Method
from panacea_jax.defences.protocol import extra_data

BASE = "unaligned base"
# What a defender may bring, as people say it.
BRINGS = {
    "harmful": "harmful records", "alignment": "refusals", "benign": "benign records", "user": "task records", BASE: "an unaligned base",
}  # fmt: skip


def lacking(method: Method, there: Collection[str]) -> str:
    """What a method needs and has not got, in words; "" where nothing is missing.

    Args:
        method: told which base it compares with, if it does.
        there: sets at hand, of :data:`BRINGS`.
    """
    named = method.folders is not None and bool(method.folders[0])
    at_hand = {*there, BASE} if named else set(there)
    needs = [BRINGS.get(what, f"config.data.{what}") for what in extra_data(method) if what not in at_hand]
    return f"needs {' and '.join(needs)}" if needs else ""


def allowed(there: Collection[str]) -> str:
    """One plain sentence: which healing methods these sets allow, and what the others lack.

    Args:
        there: sets at hand, of :data:`BRINGS`.
    """
    able, needy = [], []
    for name, kind in DEFENCES.items():
        # What takes the attacker's records is an attack, not a way to heal.
        if "heal" in kind().stages and "attack" not in extra_data(kind()):
            if needs := lacking(kind(), there):
                needy.append(f"{name} {needs}")
            else:
                able.append(name)
    brought = [BRINGS[name] for name in BRINGS if name in there]
    at_hand = f"With {', '.join(brought)}" if brought else "Without any data"
    return f"{at_hand} there are {', '.join(able)}" + (f"; {'; '.join(needy)}." if needy else ".")
