"""What a run reports and measures: a monitor over the console's progress bar and the sinks, and a meter of speed."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from glm_jax.engine.bind import EngineConfig
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.workdir.events import METRICS, Event, Jsonl, Sink, TensorBoard, WeightsAndBiases

# Dense half-precision peaks in FLOP/s a device, from the makers' data sheets, by the start of jax's device_kind.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p; after the lighter ones, whose names begin the same
}


RECOMPUTED = {"all": 0, "layer": 1, "stage": 2}  # forward passes that the backward repeats, by what it finds stashed


def matmul_rate(size: int = 1024, repeats: int = 8) -> float:
    """Measure the float32 matmul rate of this process's device, in FLOP/s: the best of `repeats`."""
    multiply = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size))
    multiply(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_flops(mesh: jax.sharding.Mesh) -> float:
    """Return the FLOP/s that the whole mesh could do: by the data sheet, on CPU as measured now.

    Emulated devices share one CPU, so there the measured rate counts once.
    """
    device = mesh.devices.flat[0]
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak * mesh.size
    return matmul_rate() * (1 if device.platform == "cpu" else mesh.size)


class Monitor:
    """Writes events to every sink and moves the bar. An event is a flat mapping with `event` and `step`.

    Values are numbers, lists of a number a layer, or text; text stays out of TensorBoard and Weights & Biases.

    Args:
        workdir: metrics.jsonl and tensorboard/ are made in it.
        total_steps: of the run, for the progress bar.
        first_step: where this process starts; what an earlier one logged beyond it is dropped, since those steps will
            be done again.
        primary: whether this process reports; the others write and show nothing.
        wandb_project: a Weights & Biases project to report to as well.

    Raises:
        UserError: the workdir cannot be written to, or wandb is asked for and not installed.
    """

    def __init__(
        self, workdir: Path, total_steps: int, first_step: int, *, primary: bool = True, wandb_project: str = ""
    ) -> None:
        self._sinks: list[Sink] = []
        self._failing: set[Sink] = set()
        done = first_step or -1  # a run that starts at 0 evaluates step 0 again
        if primary and wandb_project:
            self._sinks.append(WeightsAndBiases(workdir, wandb_project))
        if primary:
            try:
                self._sinks.append(Jsonl(workdir / METRICS, done))
            except OSError as error:
                raise UserError(f"{workdir / METRICS} cannot be written: {error.strerror}, make room for it") from error
            self._sinks.append(TensorBoard(workdir / "tensorboard", done))
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not primary,
        )

    def log(self, event: Event) -> None:
        """Write one event to every sink. One that cannot is named once, and the run goes on."""
        for sink in self._sinks:
            self._attempt(sink, lambda sink=sink: sink.write(event))

    def _attempt(self, sink: Sink, act: Callable[[], None]) -> None:
        try:
            act()
            self._failing.discard(sink)
        except OSError as error:
            if sink not in self._failing:
                self.say(f"{sink.name} cannot be written ({error.strerror}); training goes on")
            self._failing.add(sink)

    def rewind(self, step: int) -> None:
        """Forget the events after `step`, to which the run goes back, and move the bar there.

        Raises:
            UserError: the disk is full.
        """
        for sink in self._sinks:
            try:
                sink.rewind(step)
            except OSError as error:
                raise UserError(f"{sink.name} cannot go back to step {step}: {error.strerror}, make room") from error
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def progress(self, steps: int, shown: Mapping[str, str] | None = None) -> None:
        """Move the bar on, and change what it shows."""
        if shown is not None:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self._sinks:
            self._attempt(sink, sink.close)
        self._bar.close()


def summary(event: Event) -> dict[str, str]:
    """Return what the bar shows of a train event: losses by objective, gradient norm, tokens/s, MFU."""
    shown = {name.removeprefix("loss/"): f"{event[name]:.3f}" for name in event if name.startswith("loss/")}
    return {
        **shown,
        "grad": f"{event['grad_norm']:.2f}",
        "tokens/s": f"{event['tokens_per_second']:,.0f}",
        "mfu": f"{event['mfu']:.1%}",
    }


def published_flops(cfg: GLMConfig, rows: int, sequence: int, passes: int) -> float:
    """Floating-point operations of one step by the formula of GLM-130B's training code, which its log quotes.

    24 c B s N h^2 (1 + s / 6h + V / 16 N h), with B rows of s tokens, N layers, hidden size h and V rows of the
    embedding; c is `passes`: 3 for forward and backward, 4 with the forward computed again. It takes a feed-forward of
    8 h^2 weights a layer, which GLM-130B's GeGLU has. The head, never computed again, is counted right for 4 passes;
    for 3 it counts as 3/4 of that, as the paper's MFU is 3/4 of its HFU.
    """
    hidden, layers = cfg.hidden_size, cfg.num_layers
    attention, head = sequence / (6 * hidden), cfg.vocab_size / (16 * layers * hidden)
    return 24 * passes * rows * sequence * layers * hidden**2 * (1 + attention + head)


def peak_memory() -> int:
    """Return the most bytes that were in use at once: on the fullest of this process's accelerators, or by the process.

    An accelerator counts its own memory; on CPU it is the process's resident memory.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)


class Meter:
    """Measures speed between two reads.

    Args:
        cfg: its model's arithmetic and what its backward pass computes again are counted.
        sequence: tokens a row.
        peak: FLOP/s of the whole mesh, see `peak_flops`.
    """

    def __init__(self, cfg: EngineConfig, sequence: int, peak: float) -> None:
        passes = 3 if cfg.keep == "all" else 4
        self._published = [published_flops(cfg.model, 1, sequence, count) for count in (3, passes)]
        self._row_flops = 3 * cfg.model.forward_flops(sequence)  # forward, and a backward of twice its work
        self._hardware = (3 + RECOMPUTED[cfg.keep]) / 3
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin anew, so that what is not training (evaluation, saving) does not count."""
        self._start, self._wait, self._rows, self._tokens = time.perf_counter(), 0.0, 0, []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def count(self, rows: int, tokens: Any) -> None:
        """Count one step's rows and row tokens, of all processes; the latter are not waited for before `read`."""
        self._rows += rows
        self._tokens.append(tokens)

    def read(self) -> dict[str, float]:
        """Return the speed since the last read.

        Returns:
            `tokens_per_second`; `mfu`, the share of the peak that the model's own arithmetic makes; `hfu`, that with
            what the backward pass computes again; `mfu_formula` and `hfu_formula`, the same by `published_flops`;
            `data_wait`, the share of time that the step waited for data; `memory`, see `peak_memory`.
        """
        tokens = sum(map(int, self._tokens))
        elapsed = time.perf_counter() - self._start
        row_rate = self._rows / elapsed / self._peak
        mfu = row_rate * self._row_flops
        values = {
            "tokens_per_second": tokens / elapsed,
            "mfu": mfu,
            "hfu": mfu * self._hardware,
            "mfu_formula": row_rate * self._published[0],
            "hfu_formula": row_rate * self._published[1],
            "memory": peak_memory(),
            "data_wait": self._wait / elapsed,
        }
        self.restart()
        return values
