"""Where a run's events go: every sink, and the console, with a progress bar if it is a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from glm_jax.errors import UserError
from glm_jax.workdir.events import METRICS, Event, Jsonl, Sink, TensorBoard, WeightsAndBiases

BAR = "{n_fmt}/{total_fmt} {bar} {remaining}{postfix}"  # the numbers need up to 60 columns


def shown(event: Event) -> str:
    """Return what the console shows of a train event."""
    return f"loss {event['loss']:.4g}, lr {event['lr']:.1e}, {event['tokens_per_second']:,.0f} tok/s"


def shown_evaluation(event: Event) -> str:
    """Return an evaluation in a line, which says so if a value is not finite."""
    values = {name: value for name, value in event.items() if name not in ("event", "step")}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    finite = all(map(math.isfinite, values.values()))
    return f"held-out at step {event['step']}: {shown}" + ("" if finite else ": not all of it is finite")


class Monitor:
    """Writes events to every sink and moves the bar. An event is a flat mapping with `event` and `step`.

    Values are numbers, lists with a number for each layer, or text. TensorBoard and Weights & Biases get no text.

    Args:
        workdir: where to make metrics.jsonl and tensorboard/.
        total_steps: of the run, for the progress bar.
        first_step: where this process starts. Later events of an earlier process are dropped, because those steps will
            be repeated.
        primary: whether this process reports; the others write and show nothing.
        wandb_project: a Weights & Biases project to report to as well.

    Raises:
        UserError: the workdir cannot be written to, or wandb is requested but not installed.
    """

    def __init__(
        self, workdir: Path, total_steps: int, first_step: int, *, primary: bool = True, wandb_project: str = ""
    ) -> None:
        self._sinks: list[Sink] = []
        self._failing: set[Sink] = set()
        done = first_step or -1  # a run that starts at 0 evaluates step 0 again
        if primary and wandb_project:
            self._sinks.append(WeightsAndBiases(workdir, wandb_project))
        path, log = workdir / METRICS, None
        if primary:
            try:
                log = Jsonl(path, done)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}, make room for it") from error
            self._sinks.append(log)
            self._sinks.append(TensorBoard(workdir / "tensorboard", done))
        self._primary, self._total, self._done = primary, total_steps, first_step
        self._first, self._started = first_step, time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            bar_format=BAR,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=None if primary else True,  # None: a bar on a terminal alone
        )
        if log and log.damaged:
            self.say(f"{path}: {len(log.damaged)} damaged lines are left out, the first is line {log.damaged[0]}")
        if log and log.empty and first_step:
            self.say(
                f"{path} is missing or empty: it begins at step {first_step}; to keep earlier curves, stop, put it "
                "back, and resume"
            )

    def log(self, event: Event) -> None:
        """Write one event to every sink. A sink that fails is reported once, and the run continues."""
        for sink in self._sinks:
            self._attempt(sink, lambda sink=sink: sink.write(event))

    def _attempt(self, sink: Sink, act: Callable[[], None]) -> None:
        try:
            act()
            self._failing.discard(sink)
        except OSError as error:
            if sink not in self._failing:
                self.say(f"{sink.name} cannot be written ({error.strerror}); training continues")
            self._failing.add(sink)

    def rewind(self, step: int) -> None:
        """Drop the events after `step`, to which the run goes back, and move the bar there.

        Raises:
            UserError: the disk is full.
        """
        for sink in self._sinks:
            try:
                sink.rewind(step)
            except OSError as error:
                raise UserError(f"{sink.name} cannot go back to step {step}: {error.strerror}, make room") from error
        self._done = self._first = step
        self._started = time.monotonic()
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def progress(self, steps: int, event: Event | None = None) -> None:
        """Advance by some steps; show a train event in the bar, or without a terminal in a line of its own."""
        self._done += steps
        if event is not None and self._bar.disable:
            passed = time.monotonic() - self._started
            left = passed / max(1, self._done - self._first) * (self._total - self._done)
            clock, remaining = time.strftime("%H:%M:%S"), tqdm.format_interval(left)
            self.say(f"{clock} step {event['step']}/{self._total}, {shown(event)}, {remaining} left")
        elif event is not None:
            self._bar.set_postfix_str(shown(event), refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._primary:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self._sinks:
            self._attempt(sink, sink.close)
        self._bar.close()
