"""The training loop: batches in, steps out, metrics one step late, checkpoints, a clean stop."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from panacea_jax.data.batches import Stream, prefetch
from panacea_jax.defences import Defence, Loss
from panacea_jax.defences.protocol import check_packing, passes_as_received
from panacea_jax.errors import InputError
from panacea_jax.models.adapter import Adapter
from panacea_jax.models.model import Model
from panacea_jax.parallel import processes
from panacea_jax.progress import Progress
from panacea_jax.train.blame import Blame
from panacea_jax.train.checkpoints import Checkpoints
from panacea_jax.train.diagnostics import SPIKE
from panacea_jax.train.entering import with_entering
from panacea_jax.train.feeding import host_batches, put, streams_of, whole_sets
from panacea_jax.train.goodput import Goodput
from panacea_jax.train.held_out import HeldOut
from panacea_jax.train.metrics import MetricsWriter
from panacea_jax.train.signals import Preempted, sigterm
from panacea_jax.train.step import CompiledSteps, TrainState, init_state
from panacea_jax.train.trackers import Tracking
from panacea_jax.train.watch import Profile, Watch


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
    accumulate: int = 1,
    log_every: int = 10,
    checkpoints: Checkpoints | None = None,
    folder: Path | None = None,
    learning_rate: float | optax.Schedule | None = None,
    on_compile: Callable[[int], None] | None = None,
    compiled: CompiledSteps | None = None,
    profile: Profile | None = None,
    held_out: HeldOut | None = None,
    donate: bool = False,
    cache_frozen: bool = True,
    known: dict[bytes, np.ndarray] | None = None,
    tracking: Tracking | None = None,
    spike: float = SPIKE,
    spent: Goodput | None = None,
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
        accumulate: micro-batches that a batch is taken in; the gradient is that of the whole batch. The streams' ``row_multiple`` must be
            a multiple of it times the mesh's parts.
        log_every: write metrics each so many steps.
        checkpoints: where to save and resume; None keeps nothing.
        folder: where ``metrics.jsonl`` goes; None writes none.
        learning_rate: of each step, only to be logged.
        on_compile: called with the number of compiled shapes so far when it grows.
        compiled: steps to share with other runs; by default this run has its own.
        profile: steps to record, into ``folder/profile``.
        held_out: records whose loss is logged, and may end the run early.
        donate: take over ``params``, which the caller cannot use any more: with all parameters another copy of them is dear.
        cache_frozen: compute what enters the lowest adapted layer once for each record, see ``train.entering``.
        known: what runs on the same frozen layers share of that, by tokens.
        tracking: trackers that are told the metrics beside ``metrics.jsonl``; by default TensorBoard.
        spike: robust standard deviations above the median of the steps before from which on a loss is reported; 0: never.
        spent: what counts the seconds, by what they go to; resumed, those before are added.

    Raises:
        KeyError: a stream that the defence needs is missing.
        InputError: a packed stream, of which the defence would compute something else; rows that ``accumulate`` does not divide.
        Diverged: the loss, or a weight after a step, is NaN or infinite; step, tensor and records are named, the last checkpoint stays.
        Preempted: SIGTERM; the state was saved.
    """
    # ---- what is asked for
    defence, spent = defence.for_steps(steps), spent or Goodput()
    needed = streams_of(model, defence, streams)
    if defence.by_record:
        defence = defence.for_records(len(needed["user"].examples))
        needed["user"] = needed["user"].numbered()
    if any(stream.packing for stream in streams.values()):
        check_packing(defence)
    for name, stream in needed.items():
        if stream.rows % accumulate:
            raise InputError(
                f"config.train.accumulate = {accumulate}: does not divide the {stream.rows} rows of stream {name!r}; "
                "make its row_multiple a multiple of it"
            )

    # ---- state, resume
    full = not isinstance(params, Adapter)
    # Kept to measure how far training moved; with all parameters it would be too dear.
    origin = None if full or donate else params
    adapter = params if isinstance(params, Adapter) else None
    adapted: dict[str, Any] = {} if adapter is None else {"lora_scale": adapter.scale}
    if adapter is not None and adapter.numbers is not None:
        adapted["lora_layers"] = list(adapter.numbers)
    state = init_state(params, defence, optimizer, donate)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = (compiled or CompiledSteps()).find(model, defence, optimizer, shardings, accumulate)
    looking = _Looking(model, defence, needed, accumulate)
    notes: dict[str, Any] = {}
    if checkpoints is not None and checkpoints.latest() is not None:
        state, notes = checkpoints.restore(state)
        spent.restore(notes)
    else:
        with spent("step"):
            state = looking.before(state)
    start = int(state.step)
    if cache_frozen and start < steps:
        with spent("data"):
            needed = with_entering(model, params, defence, needed, steps, known)
    # Not device_put, which cannot place a key on the devices of other processes.
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=shardings.step)()

    # ---- what watches it
    writer = MetricsWriter(folder, start, tracking) if folder is not None and processes.first() else None
    watch = Watch(
        model, steps=steps, log_every=log_every, origin=origin, full=full, writer=writer, learning_rate=learning_rate,
        passes=passes_as_received(defence), blame=Blame(model, params, defence, needed, origin), spike=spike,
    )  # fmt: skip
    watch.restore(notes)
    if held_out is not None:
        held_out.restore(notes)
        steps = start if held_out.stopped else steps
    done, step_bytes = start, int(notes.get("step_bytes", 0))

    def save() -> None:
        if checkpoints is not None:
            meta = {"seed": seed, "step_bytes": step_bytes, "seconds": spent.seconds(), **adapted, **watch.notes()}
            meta |= held_out.notes() if held_out is not None else {}
            with spent("save"), jax.transfer_guard("allow"):
                checkpoints.save(state, meta)

    def close() -> None:
        if checkpoints is not None:
            with spent("save"):
                checkpoints.close()

    # ---- steps
    sizes = before = step_fn._cache_size()  # type: ignore[attr-defined]
    shapes = set()
    with contextlib.ExitStack() as stack:
        if writer is not None:
            stack.callback(writer.close)
        stack.callback(close)
        record = None
        if profile is not None and folder is not None:
            record = stack.enter_context(profile.during(folder / "profile"))
        stop = stack.enter_context(sigterm())
        bar = stack.enter_context(Progress("train", total=steps, start=start))
        batches = stack.enter_context(
            prefetch(
                host_batches(needed, defence, start, steps), put=lambda b: (b, put(model, b))
            )
        )
        # What goes between host and device here is asked for: a batch ahead, and the metrics of the step before.
        stack.enter_context(jax.transfer_guard("disallow"))
        for host, device in spent.waiting("data", batches):
            if record is not None:
                record(done + 1)
            shape = tuple(b.tokens.shape for b in device.values())
            with spent("step" if shape in shapes else "compile"), jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                state, metrics = step_fn(state, model.weights, device, key)
            done += 1
            processes.arrived(f"step {done} of {steps}")
            with spent("step"), jax.profiler.TraceAnnotation("metrics"):
                watch.step(done, host, metrics, state.params)
            if sizes != (size := step_fn._cache_size()):  # type: ignore[attr-defined]
                sizes = size
                if on_compile is not None:
                    on_compile(sizes - before)
            if shape not in shapes:
                shapes.add(shape)
                with spent("compile"):
                    step_bytes = max(step_bytes, _memory(step_fn, state, model.weights, device, key))
            bar.advance(watch.summary)
            if held_out is not None and (held_out.due(done) or done == steps):
                with jax.transfer_guard("allow"), jax.profiler.TraceAnnotation("held out"), spent("evaluate"):
                    watch.held_out(done, held_out.look(model, state.params))
            # The last step is saved below, when the defence has had its last word on ε.
            last = done == steps or (held_out is not None and held_out.stopped)
            stopping = stop.asked()
            if checkpoints is not None and not last and (checkpoints.due(done) or stopping):
                with spent("step"):
                    watch.flush()  # a state is saved only after its loss and its weights were seen to be finite
                with jax.profiler.TraceAnnotation("checkpoint"):
                    save()
            if stopping and not last:
                saved = "nothing" if checkpoints is None else "the state"
                raise Preempted(f"stopped by SIGTERM after step {done}; {saved} is saved")
            if last:
                break
        processes.arrived("the end of training")
        with spent("step"), jax.transfer_guard("allow"):
            watch.flush()
            state = looking.after(state)
        save()

    # ---- what is left
    state = state._replace(opt_state=())  # room for what is deployed
    deployed = defence.finish(state.params, state.defence_state)
    return Result(
        model, state.params, defence.epsilon(state.defence_state), deployed, state.defence_state, done,
        tuple(watch.warnings), sizes - before, step_bytes,
    )  # fmt: skip


def _memory(step_fn: Any, *arguments: Any) -> int:
    """Bytes on one device of a step that was compiled already; 0 where the back-end does not say."""
    found = step_fn.lower(*arguments).compile().memory_analysis()
    if found is None:
        return 0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held + found.temp_size_in_bytes)


class _Looking:
    """Lets a defence look at its whole sets, before the first step and after the last."""

    def __init__(
        self, model: Model, defence: Defence, streams: Mapping[str, Stream], accumulate: int
    ) -> None:
        self._defence, self._loss = defence, Loss.of(model, accumulate)
        self._sets = whole_sets(model, defence, streams)

    def before(self, state: TrainState) -> TrainState:
        return self._look(self._defence.first_pass, state)

    def after(self, state: TrainState) -> TrainState:
        return self._look(self._defence.last_pass, state)

    def _look(self, look: Callable[..., Any], state: TrainState) -> TrainState:
        where = jax.tree.map(lambda x: x.sharding, state.defence_state)
        seen = look(self._loss, state.params, self._sets, state.defence_state)
        if seen is state.defence_state:
            return state
        # Back to where the step expects it, or its first call would be compiled for itself.
        return state._replace(defence_state=jax.device_put(seen, where))
