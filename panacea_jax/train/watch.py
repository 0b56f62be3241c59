"""Watching a run from the host: metrics one step late, diagnostics, throughput, a profile of some steps."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from panacea_jax.data.batches import Batch
from panacea_jax.errors import InputError
from panacea_jax.models.model import Model
from panacea_jax.train import throughput
from panacea_jax.train.blame import Blame
from panacea_jax.train.diagnostics import SPIKE, Diagnostics
from panacea_jax.train.metrics import MetricsWriter
from panacea_jax.train.signals import Diverged
from panacea_jax.train.step import FIRST_NONFINITE


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps to record with ``jax.profiler``.

    Attributes:
        first: number of the first one, counted from 1.
        count: how many.
    """

    first: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Profile | None":
        """Of ``--profile=STEP:COUNT``; "": none.

        Raises:
            InputError: another form.
        """
        if not text:
            return None
        first, colon, count = text.partition(":")
        if not (colon and first.isdigit() and count.isdigit() and int(first) and int(count)):
            raise InputError(f"--profile={text}: STEP:COUNT, two numbers from 1 on, like 20:5")
        return cls(int(first), int(count))

    @contextlib.contextmanager
    def during(self, folder: Path) -> Iterator[Callable[[int], None]]:
        """Of a run: what is given is called before each step with its number. ``folder`` is for TensorBoard or Perfetto."""
        recording = False

        def before(step: int) -> None:
            nonlocal recording
            if recording and step == self.first + self.count:
                jax.profiler.stop_trace()
                recording = False
            if step == self.first:
                jax.profiler.start_trace(str(folder))
                recording = True

        try:
            yield before
        finally:
            if recording:  # the run ended within
                jax.profiler.stop_trace()


class Watch:
    """Reads each step's metrics one step late, so that the device never waits for the host.

    Attributes:
        warnings: diagnostics given so far.
        summary: the last loss, for a progress bar.
    """

    def __init__(
        self,
        model: Model,
        *,
        steps: int,
        passes: Mapping[str, float | int],
        log_every: int,
        origin: Any = None,
        full: bool = False,
        writer: MetricsWriter | None = None,
        learning_rate: float | optax.Schedule | None = None,
        blame: Blame | None = None,
        spike: float = SPIKE,
    ) -> None:
        """
        Args:
            model: gives shapes and mesh.
            steps: length of the run.
            passes: a step, by stream, over one batch as it comes.
            log_every: write metrics each so many steps.
            origin: the trainable tree at the start, to measure how far training moved; None: not measured.
            full: whether all parameters are trained.
            writer: where metrics go; None: nowhere.
            learning_rate: of each step, to be logged.
            blame: names records and tensors of a step that went wrong; None: nobody does.
            spike: see ``Diagnostics``.
        """
        self._model, self._writer, self._log_every, self._steps = model, writer, log_every, steps
        self._full, self._passes, self._origin, self._rate = full, passes, origin, learning_rate
        self._blame = blame
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._diagnostics = Diagnostics(steps, spike)
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
        """Take in a step that was just dispatched, and read the one before it."""
        self.flush()
        if self._origin is not None and "norm_epsilon" in metrics:
            metrics["displacement"] = _distance(params, self._origin)
        self._pending = (step, metrics)
        self._steps_since += 1
        self._tokens += int(host["user"].valid.sum())
        self._all_tokens += sum(
            self._passes.get(n, 0) * int(b.valid.sum()) for n, b in host.items()
        )

    def flush(self) -> None:
        """Fetch the pending step, check it, log it.

        Raises:
            Diverged: its loss, or the norm of the weights after it, is NaN or infinite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
        gradient = int(scalars.pop(FIRST_NONFINITE, -1))
        if not math.isfinite(scalars["loss"]) or not math.isfinite(scalars.get("norm_params", 0)):
            raise Diverged(self._diverged(step, scalars, gradient))
        if scalars.get("displacement", 0) > 0:
            scalars["rho_displacement"] = scalars["norm_epsilon"] / scalars["displacement"]
        if spike := self._diagnostics.spike(scalars):
            if self._writer is not None:
                self._writer.write(step, {"spike": scalars["loss"]})
            if spike.told:
                self._warn(f"step {step}: {spike.text}{self._records(step)}")
        for warning in self._diagnostics.observe(step, scalars):
            self._warn(warning)
        self.summary = f"loss {scalars['loss']:.3f}"
        if step % self._log_every == 0 or step == self._steps:
            self._log(step, scalars)

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        logging.warning("%s", warning)

    def _records(self, step: int) -> str:
        return f"; {self._blame.records(step)}" if self._blame is not None else ""

    def _diverged(self, step: int, scalars: Mapping[str, float], gradient: int) -> str:
        loss = scalars["loss"]
        what = f"the task loss is {loss}" if not math.isfinite(loss) else f"the weights are not finite after it (task loss {loss:.3f})"
        with jax.transfer_guard("allow"):
            cause = f": {self._blame.cause(step, gradient)}" if self._blame is not None else ""
        return f"step {step}: {what}{cause}{self._records(step)}; nothing was saved after it"

    def held_out(self, step: int, loss: float) -> None:
        """Log the loss on held-out records after a step, whose own metrics go first."""
        self.flush()
        self.summary += f", held out {loss:.3f}"
        if self._writer is not None:
            self._writer.write(step, {"validation_loss": loss})

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        # The next interval begins here: what is written below may wait for the step that runs by now.
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        scalars["tokens_per_second"] = self._tokens / seconds
        scalars["step_seconds"] = seconds / max(self._steps_since, 1)
        if self._rate is not None:
            scalars["learning_rate"] = _on_host(self._rate, step - 1)
        peak = throughput.peak_flops(self._model.mesh.devices.flat[0])
        if peak is not None:
            per_token = throughput.train_flops_per_token(
                self._model.config.matmul_parameters(), self._full
            )
            scalars["mfu"] = per_token * self._all_tokens / seconds / peak / self._model.mesh.size
        self._tokens, self._all_tokens, self._steps_since = 0, 0.0, 0
        if self._writer is not None:
            self._writer.write(step, scalars)


def _on_host(rate: float | optax.Schedule, step: int) -> float:
    """The value of a schedule, without a wait for the step that an accelerator is at."""
    if not callable(rate):
        return float(rate)
    with jax.transfer_guard("allow"), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return float(rate(step))


@jax.jit
def _distance(a: Any, b: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
