"""Layer safety coefficients: where in the network ε sits, hence which layers carry safety (Panacea,
arXiv 2501.18100).

For layer l with entries ε_l (n_l of them): ``norm = ‖ε_l‖``, ``share = ‖ε_l‖² / Σ_k ‖ε_k‖²``,
``density = ‖ε_l‖ / sqrt(n_l)`` and, for an adapter, ``effective = ‖s(B+ε_B)(A+ε_A) − sBA‖_F`` over
the layer's projections. All in float64 on the host.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from panacea_jax.errors import InputError
from panacea_jax.parallel import processes

Coefficients = dict[str, Any]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Order of the projections in files and figures; other modules (norms of full-parameter ε) follow
by name."""


def layer_coefficients(
    epsilon: Any,
    params: Any = None,
    scale: float | None = None,
    kind: str = "last",
    numbers: Sequence[int] | None = None,
) -> Coefficients:
    """Coefficients of every layer, in the shape of one object of layers.json.

    Args:
        epsilon: an Adapter, its nested dict
            ``{"self_attn": {"q_proj": {"a": [L, in, r], "b": [L, r, out]}, …}, "mlp": {…}}``, or a
            weight tree whose stacked part is under "layers".
        params: the adapter w that ε belongs to, in the same form; needed for "effective".
        scale: s = α/r; taken from ``params`` or ``epsilon`` where one is an Adapter.
        kind: which ε this is, "last" or "mean" (the running mean over training).
        numbers: of the stacked layers in the model; by default those of an Adapter, else 0, 1, …

    Returns:
        One object of layers.json: ``{"epsilon": kind, "layers": [{"layer", "norm", "share",
        "density", "effective", "modules": {name: {"norm", "share"}}}, …], "outside": …}``.
        A module's share is of the same total as its layer's, so the shares of a layer's modules add
        up to the layer's and those of all layers to 1 (all are 0 for ε = 0). "effective" is None
        without params, without a scale, or for a weight tree. "outside" holds norm and modules of
        what belongs to no layer (embeddings, final norm, head), outside every share; None for an
        adapter.

    Raises:
        InputError: no stacked array, arrays that disagree on the number of layers, shapes of params
            and ε that differ, NaN or inf.
    """
    layers, outside = _split_tree(epsilon)
    modules = _modules(layers)
    squares = {
        name: np.sum([_square_norms(a, name) for a in arrays.values()], axis=0)
        for name, arrays in modules.items()
    }
    depths = {s.size for s in squares.values()}
    if len(depths) != 1:
        raise InputError(
            f"epsilon: layers are stacked in {sorted(depths) or 'no arrays'}, not one depth"
        )
    entries = sum(math.prod(a.shape[1:]) for arrays in modules.values() for a in arrays.values())
    total = sum(float(s.sum()) for s in squares.values())
    effective = _effective(modules, params, _scale(epsilon, params, scale))
    rows = []
    depth = depths.pop()
    numbers = getattr(epsilon, "numbers", None) if numbers is None else numbers
    for l, number in enumerate(range(depth) if numbers is None else numbers):
        square = math.fsum(float(squares[name][l]) for name in squares)
        rows.append(
            {
                "layer": number,
                "norm": math.sqrt(square),
                "share": _ratio(square, total),
                "density": math.sqrt(square / entries),
                "effective": None if effective is None else float(effective[l]),
                "modules": {
                    name: _norm_and_share(float(s[l]), total) for name, s in squares.items()
                },
            }
        )
    return {"epsilon": kind, "layers": rows, "outside": outside}


def _split_tree(tree: Any) -> tuple[Mapping[str, Any], Coefficients | None]:
    """The stacked part of an Adapter, adapter dict or weight tree, and the figures of what lies
    outside it."""
    tree = getattr(tree, "layers", tree)
    if not isinstance(tree, Mapping):
        raise InputError(f"epsilon: {type(tree).__name__} is no adapter or weight tree")
    if "layers" not in tree:
        return tree, None
    squares: dict[str, float] = {}
    for path, array in _leaves({key: value for key, value in tree.items() if key != "layers"}):
        name = path[0]
        square = float(_square_norms(processes.to_host(array)[None], name)[0])
        squares[name] = squares.get(name, 0.0) + square
    norms = {name: {"norm": math.sqrt(square)} for name, square in squares.items()}
    return tree["layers"], {"norm": math.sqrt(math.fsum(squares.values())), "modules": norms}


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif value is not None:
            yield (*path, key), value


def _modules(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stacked arrays by module ("q_proj") and name within it ("a"), projections first."""
    found: dict[str, dict[str, Any]] = {}
    for path, array in _leaves(layers):
        if len(path) < 2 or np.ndim(array) < 2:
            raise InputError(f"epsilon: {'/'.join(path)} is not stacked over layers")
        found.setdefault(path[-2], {})[path[-1]] = processes.to_host(array)
    order = [*(m for m in MODULES if m in found), *sorted(set(found) - set(MODULES))]
    return {name: found[name] for name in order}


def _square_norms(array: Any, name: str) -> Float[np.ndarray, " L"]:
    """Squared norm of each layer's slice, one layer in float64 at a time (a 7B kernel stack would
    not fit whole)."""
    flat = (np.asarray(part, np.float64).ravel() for part in array)
    squares = np.array([part @ part for part in flat], np.float64)
    if not np.isfinite(squares).all():
        layer = int(np.argmin(np.isfinite(squares)))
        raise InputError(f"epsilon: {name} holds NaN or inf in layer {layer}")
    return squares


def _scale(epsilon: Any, params: Any, scale: float | None) -> float | None:
    if scale is not None:
        return float(scale)
    found = getattr(params, "scale", getattr(epsilon, "scale", None))
    return None if found is None else float(found)


def _effective(
    modules: Mapping[str, Mapping[str, Any]], params: Any, scale: float | None
) -> Float[np.ndarray, " L"] | None:
    """‖s(B+ε_B)(A+ε_A) − sBA‖_F per layer over all projections, or None where it is not defined."""
    if (
        params is None
        or scale is None
        or not all(set(arrays) == {"a", "b"} for arrays in modules.values())
    ):
        return None
    weights = _modules(_split_tree(params)[0])
    shapes = {name: {k: a.shape for k, a in arrays.items()} for name, arrays in modules.items()}
    if {
        name: {k: a.shape for k, a in arrays.items()} for name, arrays in weights.items()
    } != shapes:
        raise InputError(
            "epsilon: modules or shapes differ from those of the adapter it is applied to"
        )
    squares = sum(
        np.square(
            [
                product_norm_change(w["a"][l], w["b"][l], e["a"][l], e["b"][l])
                for l in range(len(w["a"]))
            ]
        )
        for w, e in ((weights[name], modules[name]) for name in modules)
    )
    return abs(scale) * np.sqrt(squares)


def product_norm_change(a: Any, b: Any, a_change: Any, b_change: Any) -> float:
    """‖(a + δa)(b + δb) − ab‖_F for a [in, r] and b [r, out], without an [in, out] matrix.

    The difference is ``δa (b + δb) + a δb = [δa, a] [b + δb; δb]``, of rank 2r at most, so the QR
    factors of the two thin sides give the norm. Nothing large is subtracted, hence it stays
    accurate for ε far smaller than w.
    """
    a, b, a_change, b_change = (np.asarray(x, np.float64) for x in (a, b, a_change, b_change))
    left = np.concatenate([a_change, a], axis=1)
    right = np.concatenate([b + b_change, b_change], axis=0)
    r_left = np.asarray(np.linalg.qr(left, mode="r"))
    r_right = np.asarray(np.linalg.qr(right.T, mode="r"))
    return float(np.linalg.norm(r_left @ r_right.T))


def _ratio(square: float, total: float) -> float:
    return square / total if total > 0 else 0.0


def _norm_and_share(square: float, total: float) -> dict[str, float]:
    return {"norm": math.sqrt(square), "share": _ratio(square, total)}
