"""The training loop: batches in, steps out, metrics one step late, checkpoints, a clean stop."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from panacea_jax.data.batches import Batch, Stream, prefetch
from panacea_jax.defences import Defence, Loss, Method
from panacea_jax.defences.protocol import check_packing, for_steps, passes_of
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.model import Model
from panacea_jax.parallel import batch_sharding, processes
from panacea_jax.progress import Progress
from panacea_jax.train import throughput
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.diagnostics import Diagnostics
from panacea_jax.train.metrics import MetricsWriter
from panacea_jax.train.step import TrainState, find_step, init_state


class Preempted(Exception):
    """SIGTERM came; the state is saved. The command line exits with 75, so that a scheduler starts it again."""


class Diverged(Exception):
    """The loss stopped being a number."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training run leaves.

    Attributes:
        model: the base.
        params: w, the trained tree *without* ε.
        epsilon: ε, or None for a defence that has none.
        deployed: what the defence deploys, for Panacea w + ε.
        state: the defence's final state.
        steps: steps done.
        warnings: diagnostics given during the run.
        compilations: number of shapes for which the step was compiled.
        step_bytes: memory of one device that the compiled step needs, weights and state included, at the longest batch so far.
    """

    model: Model
    params: Any
    epsilon: Any
    deployed: Any
    state: Any
    steps: int
    warnings: tuple[str, ...]
    compilations: int
    step_bytes: int = 0


def finetune(
    model: Model,
    params: Any,
    defence: Defence,
    streams: Mapping[str, Stream],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    seed: int = 0,
    log_every: int = 10,
    checkpoints: Checkpoints | None = None,
    folder: Path | None = None,
    on_compile: Callable[[int], None] | None = None,
    donate: bool = False,
) -> Result:
    """Train ``params`` with a defence and return w, ε and what is deployed.

    Args:
        model: the base; its weights stay frozen (``model.weights`` is None when all parameters train).
        params: where training starts: an Adapter, or all weights.
        defence: any defence with a gradient.
        streams: ``{"user": Stream, …}``, one for each of ``defence.streams`` besides.
        optimizer: see :func:`panacea_jax.train.optimizer.make_optimizer`.
        steps: total number of steps; a run that is resumed does the rest.
        seed: root of the random keys that steps receive.
        log_every: write metrics each so many steps.
        checkpoints: where to save and resume; None keeps nothing.
        folder: where ``metrics.jsonl`` goes; None writes none.
        on_compile: called with the number of compiled shapes so far when it grows.
        donate: take over ``params``, which the caller cannot use any more: with all parameters another copy of them is dear.

    Raises:
        KeyError: a stream that the defence needs is missing.
        InputError: a packed stream, of which the defence would compute something else.
        Diverged: the loss is NaN or infinite; the step is named, the last good checkpoint stays.
        Preempted: SIGTERM; the state was saved.
    """
    defence = for_steps(defence, steps)
    missing = [name for name in ("user", *defence.streams) if name not in streams]
    if missing:
        raise KeyError(f"{type(defence).__name__} needs the data streams {missing}")
    if any(stream.packing for stream in streams.values()):
        check_packing(defence)

    # ---- state, resume
    full = not isinstance(params, Adapter)
    # Kept to measure how far training moved; with all parameters it would be too dear.
    origin = None if full or donate else params
    scale = {} if full else {"lora_scale": params.scale}
    state = init_state(params, defence, optimizer, donate)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = find_step(model, defence, optimizer, shardings)
    notes: dict[str, Any] = {}
    if checkpoints is not None and checkpoints.latest() is not None:
        state, notes = checkpoints.restore(state)
    else:
        state = _look("first_pass", model, defence, streams, state)
    start = int(state.step)
    # Not device_put, which cannot place a key on the devices of other processes.
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=jax.tree.leaves(shardings)[-1])()

    # ---- loop
    writer = MetricsWriter(folder, start) if folder is not None and processes.first() else None
    needed = {name: streams[name] for name in ("user", *defence.streams)}
    passes = {name: n / needed[name].repeats for name, n in passes_of(defence).items()}
    watch = _Watch(model, origin, full, passes, writer, log_every, steps)
    intervals = getattr(defence, "intervals", {})
    watch.restore(notes)
    done, step_bytes = start, int(notes.get("step_bytes", 0))

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(
                state, {"seed": seed, "step_bytes": step_bytes, **scale, **watch.notes()}
            )

    compiled = before = step_fn._cache_size()  # type: ignore[attr-defined]
    shapes = set()
    with contextlib.ExitStack() as stack:
        if writer is not None:
            stack.callback(writer.close)
        if checkpoints is not None:
            stack.callback(checkpoints.close)
        stop = stack.enter_context(_sigterm())
        bar = stack.enter_context(Progress("train", total=steps, start=start))
        batches = stack.enter_context(
            prefetch(_host_batches(needed, intervals, start, steps), put=lambda b: _put(model, b))
        )
        for host, device in batches:
            state, metrics = step_fn(state, model.weights, device, key)
            done += 1
            processes.arrived(f"step {done} of {steps}")
            watch.step(done, host, metrics, state.params)
            if compiled != (size := step_fn._cache_size()):  # type: ignore[attr-defined]
                compiled = size
                if on_compile is not None:
                    on_compile(compiled - before)
            if (shape := tuple(b.tokens.shape for b in device.values())) not in shapes:
                shapes.add(shape)
                step_bytes = max(step_bytes, _memory(step_fn, state, model.weights, device, key))
            bar.advance(watch.summary)
            # The last step is saved below, when the defence has had its last word on ε.
            last, stopping = done == steps, stop.asked()
            if checkpoints is not None and not last and (checkpoints.due(done) or stopping):
                watch.flush()  # a state is saved only after its loss was seen to be finite
                save()
            if stopping and not last:
                saved = "nothing" if checkpoints is None else "the state"
                raise Preempted(f"stopped by SIGTERM after step {done}; {saved} is saved")
        watch.flush()
        processes.arrived("the end of training")
        state = _look("last_pass", model, defence, streams, state)
        save()

    state = state._replace(opt_state=())  # room for what is deployed
    deployed = defence.finish(state.params, state.defence)
    epsilon = getattr(state.defence, "epsilon", None)
    return Result(
        model, state.params, epsilon, deployed, state.defence, done, tuple(watch.warnings),
        compiled - before, step_bytes,
    )  # fmt: skip


def _memory(step_fn: Any, *arguments: Any) -> int:
    """Bytes on one device of a step that was compiled already; 0 where the back-end does not say."""
    found = step_fn.lower(*arguments).compile().memory_analysis()
    if found is None:
        return 0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held + found.temp_size_in_bytes)


def _host_batches(
    streams: Mapping[str, Stream], intervals: Mapping[str, int], start: int, steps: int
) -> Iterator[dict[str, Batch]]:
    for step in range(start, steps):
        yield {name: s.batch(step // intervals.get(name, 1)) for name, s in streams.items()}


def _put(
    model: Model, batches: Mapping[str, Batch]
) -> tuple[Mapping[str, Batch], dict[str, Batch]]:
    """Place rows on the mesh. Every process builds the same global batch and keeps its own rows."""
    sharding = batch_sharding(model.mesh)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return batches, jax.tree.map(place, dict(batches))


def whole_sets(
    model: Model, defence: Method, streams: Mapping[str, Stream]
) -> dict[str, Iterator[Batch]]:
    """Of each extra stream of the defence every record once, on the devices."""

    def once(stream: Stream) -> Iterator[Batch]:
        return (_put(model, {"": batch})[1][""] for batch in stream.once())

    return {name: once(streams[name]) for name in defence.streams}


def _look(
    which: str, model: Model, defence: Defence, streams: Mapping[str, Stream], state: TrainState
) -> TrainState:
    """Let a defence look at its whole sets, in its ``first_pass`` or ``last_pass``, if it has that."""
    look = getattr(defence, which, None)
    if look is None:
        return state
    sets = whole_sets(model, defence, streams)
    where = jax.tree.map(lambda x: x.sharding, state.defence)
    seen = look(Loss.of(model), state.params, sets, state.defence)
    # Back to where the step expects it, or its first call would be compiled for itself.
    return state._replace(defence=jax.device_put(seen, where))


class _Stop:
    """Whether SIGTERM came."""

    def __init__(self) -> None:
        self._set = False

    def set(self, *_: Any) -> None:
        self._set = True

    def asked(self) -> bool:
        """Whether to stop after this step; several processes, of which perhaps one alone was told to stop, agree on the step."""
        return processes.stop_asked() if processes.count() > 1 else self._set


@contextlib.contextmanager
def _sigterm() -> Iterator[_Stop]:
    """Turn SIGTERM into a flag for the length of the loop; outside the main thread signals cannot be caught."""
    stop = _Stop()
    if processes.count() > 1:  # jax.distributed catches the signal itself
        yield stop
        return
    try:
        previous = signal.signal(signal.SIGTERM, stop.set)
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Watch:
    """Reads each step's metrics one step late, so that the device never waits for the host."""

    def __init__(
        self,
        model: Model,
        origin: Any,
        full: bool,
        passes: Mapping[str, float | int],
        writer: MetricsWriter | None,
        log_every: int,
        steps: int,
    ) -> None:
        self._model, self._writer, self._log_every, self._steps = model, writer, log_every, steps
        self._full, self._passes, self._start = full, passes, origin
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._diagnostics = Diagnostics(steps)
        self._tokens, self._all_tokens, self._since = 0, 0.0, time.perf_counter()
        self._steps_since = 0
        self.warnings: list[str] = []
        self.summary = ""

    def notes(self) -> dict[str, Any]:
        """What goes into a checkpoint, so that a resumed run says what the whole would have said, and nothing twice."""
        return {"warnings": self.warnings, "diagnostics": self._diagnostics.state()}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Go on from the ``notes`` of the run that was stopped."""
        if "diagnostics" in notes:
            self.warnings = list(notes["warnings"])
            self._diagnostics.restore(notes["diagnostics"])

    def step(
        self, step: int, host: Mapping[str, Batch], metrics: dict[str, Any], params: Any
    ) -> None:
        self.flush()
        if self._start is not None and "norm_epsilon" in metrics:
            metrics["displacement"] = _distance(params, self._start)
        self._pending = (step, metrics)
        self._steps_since += 1
        self._tokens += int(host["user"].valid.sum())
        self._all_tokens += sum(
            self._passes.get(n, 0) * int(b.valid.sum()) for n, b in host.items()
        )

    def flush(self) -> None:
        """Fetch the pending step, check it, log it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(scalars["loss"]):
            raise Diverged(
                f"step {step}: the task loss is {scalars['loss']}; nothing was saved after it"
            )
        if scalars.get("displacement", 0) > 0:
            scalars["rho_displacement"] = scalars["norm_epsilon"] / scalars["displacement"]
        for warning in self._diagnostics.observe(step, scalars):
            self.warnings.append(warning)
            logging.warning("%s", warning)
        self.summary = f"loss {scalars['loss']:.3f}"
        if step % self._log_every == 0 or step == self._steps:
            self._log(step, scalars)

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        scalars["tokens_per_second"] = self._tokens / seconds
        scalars["step_seconds"] = seconds / max(self._steps_since, 1)
        peak = throughput.peak_flops(self._model.mesh.devices.flat[0])
        if peak is not None:
            per_token = throughput.train_flops_per_token(
                self._model.config.matmul_parameters(), self._full
            )
            scalars["mfu"] = per_token * self._all_tokens / seconds / peak / self._model.mesh.size
        self._tokens, self._all_tokens, self._since = 0, 0.0, time.perf_counter()
        self._steps_since = 0
        if self._writer is not None:
            self._writer.write(step, scalars)


@jax.jit
def _distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
