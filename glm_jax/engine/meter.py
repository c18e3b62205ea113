"""How fast a run is: tokens a second, the share of the hardware's peak, and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import SupportsInt

from glm_jax.engine.bind import EngineConfig
from glm_jax.parallel.devices import peak_memory

# forward passes whose products the backward repeats, by what is stashed
RECOMPUTED = {"all": 0, "products": 0, "layer": 1, "stage": 2}


class Meter:
    """Measures speed between two reads.

    Args:
        cfg: counts the model's arithmetic and what the backward pass computes again.
        sequence: tokens a row.
        peak: FLOP/s of the whole mesh, see `parallel.devices.peak_flops`.
    """

    def __init__(self, cfg: EngineConfig, sequence: int, peak: float) -> None:
        passes = 3 if RECOMPUTED[cfg.keep] == 0 else 4
        self._published = [cfg.model.published_flops(sequence, count) for count in (3, passes)]
        self._row_flops = 3 * cfg.model.forward_flops(sequence)  # forward, and a backward of twice its work
        self._hardware = (3 + RECOMPUTED[cfg.keep]) / 3
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Start measuring anew, so that time not spent training (evaluation, saving) does not count."""
        self._start, self._wait, self._rows = time.perf_counter(), 0.0, 0
        self._tokens: list[SupportsInt] = []

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Count the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def count(self, rows: int, tokens: SupportsInt) -> None:
        """Count one step's rows and row tokens, of all processes. Only `read` waits for the tokens."""
        self._rows += rows
        self._tokens.append(tokens)

    def read(self) -> dict[str, float]:
        """Return the speed since the last read.

        Returns:
            `tokens_per_second`; `mfu`, the model's own arithmetic as a share of the peak; `hfu`, the same including
            what the backward pass computes again; `mfu_formula` and `hfu_formula`, the same by the model's
            `published_flops`; `data_wait`, the share of time spent waiting for data; `memory`, see
            `peak_memory`.
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
