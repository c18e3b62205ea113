"""Compile the attention kernels for TPUs, forward and backward, without a TPU: whether they fit its fast memory.

    python tests/proofs/compile_attention.py [--target v5e:2x2]

Needs libtpu. Nothing runs: that the numbers are right is shown on a CPU, by tests/model/test_attention_fused.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

SHAPES = [  # S, N, K
    (2048, 4, 128), (8192, 2, 128), (1152, 2, 64), (1024, 3, 32), (512, 2, 256), (512, 2, 40),
]  # fmt: skip


def temporaries(device: Any, length: int, heads: int, dim: int, dtype: str) -> int:
    """Return the bytes of temporaries of the compiled program, for 2 rows."""
    import jax
    import jax.numpy as jnp

    from glm_jax.model import GLMConfig, Visibility
    from glm_jax.model.attention_pallas import pallas

    cfg, on = GLMConfig(1, heads * dim, heads, 8, 64), jax.sharding.SingleDeviceSharding(device)

    def describe(shape: tuple[int, ...], dtype: str = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on)

    def both(queries: Any, keys: Any, values: Any, gradient: Any, visibility: Visibility) -> object:
        def mix(queries: Any, keys: Any, values: Any) -> Any:
            return pallas(cfg, queries, keys, values, visibility, None, jnp.int32(0), jnp.arange(heads), None)

        mixed, pull = jax.vjp(mix, queries, keys, values)
        return mixed, pull(gradient)

    by_token, by_head = describe((2, length, heads, dim)), describe((2, heads, length, dim))
    visibility = Visibility(describe((2, length), "int32"), describe((2, length), "bool"))
    compiled = jax.jit(both).lower(by_token, by_head, by_head, by_token, visibility).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    """Print a line for each shape and dtype."""
    from glm_jax.planning import targets

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="v5e:2x2")
    device = targets.devices(targets.find(parser.parse_args().target), 1)[0]
    for length, heads, dim in SHAPES:
        for dtype in ("float32", "bfloat16"):
            size = temporaries(device, length, heads, dim, dtype)
            print(f"2 rows of {length}, {heads} heads of {dim}, {dtype}: compiled, {size / 1e6:.1f} MB of temporaries")


if __name__ == "__main__":
    main()
