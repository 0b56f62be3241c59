"""Which methods the data at hand allows, said before any is tried."""

from collections.abc import Collection

from panacea_jax.defences import DEFENCES, Method
from panacea_jax.defences.protocol import extra_data

BASE = "unaligned base"
# What a defender may bring, as people say it.
BRINGS = {
    "harmful": "harmful records", "alignment": "refusals", "benign": "benign records", "user": "task records", BASE: "an unaligned base",
}  # fmt: skip


def lacking(method: Method, there: Collection[str]) -> list[str]:
    """What a method needs and has not got, of :data:`BRINGS`."""
    has_base = method.folders is not None and bool(method.folders[0])
    there = {*there, BASE} if has_base else set(there) - {BASE}
    return [name for name in extra_data(method) if name not in there]


def allowed(there: Collection[str]) -> str:
    """One plain sentence: which healing methods these sets allow, and what the others lack.

    Args:
        there: sets at hand, of :data:`BRINGS`.
    """
    able, needy = [], []
    for name, kind in DEFENCES.items():
        if "heal" in kind().stages:
            needs = [BRINGS[what] for what in extra_data(kind()) if what not in there]
            if needs:
                needy.append(f"{name} needs {' and '.join(needs)}")
            else:
                able.append(name)
    brought = [BRINGS[name] for name in BRINGS if name in there]
    at_hand = f"With {', '.join(brought)}" if brought else "Without any data"
    return f"{at_hand} there are {', '.join(able)}" + (f"; {'; '.join(needy)}." if needy else ".")
