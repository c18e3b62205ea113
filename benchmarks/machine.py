"""Two sides that say what this machine can do: `matmul`, in flop, and `bandwidth`, in bytes read.

    python benchmarks/machine.py matmul|bandwidth

The product is float32 of 2,048 x 2,048, by XLA. The reading is of two arrays of 256 MB, each by its own thread.
"""

from __future__ import annotations

import concurrent.futures
import sys

import numpy as np
import rounds
from rounds import CORES, Side

SIZE = 2048
TIMES = 16  # of a product in a turn
MATMUL_FLOPS = 2 * SIZE**3 * TIMES
READ_BYTES = CORES * 2**28


def sides() -> list[Side]:
    """Return both."""
    return [Side(name, [sys.executable, __file__, name], {"JAX_PLATFORMS": "cpu"}) for name in ("matmul", "bandwidth")]


def matmul() -> None:
    """Multiply square matrices."""
    import jax

    left, right = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE))
    product = jax.jit(jax.numpy.matmul)

    def turn() -> dict[str, float]:
        for _ in range(TIMES):
            product(left, right).block_until_ready()
        return {}

    rounds.serve(turn)


def bandwidth() -> None:
    """Read arrays that no cache holds."""
    arrays = [np.ones(2**26, np.float32) for _ in range(CORES)]
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        rounds.serve(lambda: dict(zip("ab", pool.map(lambda array: float(array @ array), arrays), strict=True)))


if __name__ == "__main__":
    {"matmul": matmul, "bandwidth": bandwidth}[sys.argv[1]]()
