"""Two sides that say what this machine can do: `matmul`, in flop, and `bandwidth`, in bytes read.

    python benchmarks/machine.py matmul|bandwidth

The product is float32 of 2,048 x 2,048, by XLA. The reading is of two arrays of 256 MB, each by its own thread.
"""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Sequence

import numpy as np
import rounds
from rounds import CORES, Side

SIZE = 2048
TIMES = 16  # of a product in a turn
NUMBERS = 2**26  # of an array
MATMUL_FLOPS = 2 * SIZE**3 * TIMES
READ_BYTES = 4 * CORES * NUMBERS


def side(name: str) -> Side:
    """Return the side `matmul` or `bandwidth`."""
    return rounds.script(name, __file__, name)


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
    arrays = [np.ones(NUMBERS, np.float32) for _ in range(CORES)]
    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        rounds.serve(lambda: dict(zip("ab", pool.map(lambda array: float(array @ array), arrays), strict=True)))


def main(words: Sequence[str]) -> None:
    """Be one of the sides."""
    {"matmul": matmul, "bandwidth": bandwidth}[words[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
