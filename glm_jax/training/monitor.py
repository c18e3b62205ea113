"""What a run reports: one monitor, three sinks (console with a progress bar, metrics.jsonl, TensorBoard)."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter
from tqdm import tqdm

from glm_jax.files import write_atomic
from glm_jax.training.engine import EngineConfig

Event = Mapping[str, Any]

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
    """Give the FLOP/s that the whole mesh could do: by the data sheet, on CPU as measured now.

    Emulated devices share one CPU, so there the measured rate counts once.
    """
    device = mesh.devices.flat[0]
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak * mesh.size
    return matmul_rate() * (1 if device.platform == "cpu" else mesh.size)


class Monitor:
    """Writes events to every sink. An event is a flat mapping with `event` and `step`.

    Args:
        workdir: metrics.jsonl and tensorboard/ are made in it.
        total_steps: of the run, for the progress bar.
        first_step: where this process starts; what an earlier one logged beyond it is dropped, since those steps will
            be done again.
    """

    def __init__(self, workdir: Path, total_steps: int, first_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        done = first_step or -1  # a run that starts at 0 evaluates step 0 again
        _drop_after(self._path, done)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        suffix = f".{first_step}"  # files are named by the second, and two starts may share one
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1, filename_suffix=suffix)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def log(self, event: Event) -> None:
        """Write one event to metrics.jsonl and TensorBoard."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        for name, value in event.items():
            if name not in ("event", "step"):
                self._board.add_scalar(f"{event['event']}/{name}", value, event["step"])

    def progress(self, steps: int, shown: Mapping[str, str] | None = None) -> None:
        """Move the bar on, and change what it shows."""
        if shown is not None:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Flush and close every sink."""
        self._bar.close()
        self._file.close()
        self._board.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the events up to `step`, and drop a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if event["step"] <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))


class Meter:
    """Measures speed between two reads."""

    def __init__(self, cfg: EngineConfig, sequence: int, peak: float) -> None:
        self._row_flops = 3 * cfg.model.forward_flops(sequence)  # forward, and a backward of twice its work
        self._hardware = (3 + RECOMPUTED[cfg.keep]) / 3
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin anew, so that what is not training (evaluation, saving) does not count."""
        self._start, self._wait, self._rows, self._tokens = time.perf_counter(), 0.0, 0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def count(self, rows: int, tokens: int) -> None:
        """Count one step's rows and row tokens."""
        self._rows += rows
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Give the speed since the last read.

        Returns:
            `tokens_per_second`; `mfu`, the share of the peak that the model's own arithmetic makes; `hfu`, that with
            what the backward pass computes again; `data_wait`, the share of time that the step waited for data.
        """
        elapsed = time.perf_counter() - self._start
        mfu = self._rows * self._row_flops / elapsed / self._peak
        values = {
            "tokens_per_second": self._tokens / elapsed,
            "mfu": mfu,
            "hfu": mfu * self._hardware,
            "data_wait": self._wait / elapsed,
        }
        self.restart()
        return values
