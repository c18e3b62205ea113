"""The initial scale of every parameter against the papers' formulas, for every norm and initialisation."""

import re
from itertools import combinations
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.model import GLMConfig, init

L, D, N, F, V, S = 4, 48, 12, 80, 112, 32  # no two sums of two sizes are equal
XAVIER = (1 / D) ** 0.5  # of a D x D matrix: the root of 2 / (D + D)
DEPTH = (2 * L) ** -0.5
ERRORS = 5.0  # a standard deviation of n draws has relative standard error (2 n) ** -0.5; seeds are fixed

# Gains on (v, attention output, up, down): DeepNorm as in the paper, section 2.1; pre and sandwich as in GPT-2.
GAINS = {
    "deepnorm": (DEPTH, DEPTH, DEPTH, DEPTH), "post": (1, 1, 1, 1), "pre": (1, DEPTH, 1, DEPTH),
    "sandwich": (1, DEPTH, 1, DEPTH),
}  # fmt: skip


def paths(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def expected(norm: str, initialisation: str) -> dict[str, np.ndarray]:
    """Return the standard deviation of each kernel and table; that of qkv by head and part, [N, 3]."""
    value, output, up, down = GAINS[norm]
    tables = {"word": (2 / (V + D)) ** 0.5, "position": (2 / (S + D)) ** 0.5, "block_position": (2 / (S + D)) ** 0.5}
    qkv, attention, above, below = (
        np.ones((N, 3)),
        output * XAVIER,
        up * (2 / (D + F)) ** 0.5,
        down * (2 / (D + F)) ** 0.5,
    )
    if initialisation == "xavier":
        qkv[:, 2] = value
    elif initialisation == "largescale":
        qkv[2::3] = value  # the last of three heads on each of four ranks
    qkv *= XAVIER
    if initialisation == "normal":
        tables, qkv[:] = dict.fromkeys(tables, 0.02), 0.02
        attention, above, below = 0.02 * DEPTH, 0.02, 0.02 * DEPTH
    kernels = {"attention/qkv": qkv, "attention/output": attention, "feedforward/up": above, "feedforward/down": below}
    names = {f"blocks/{name}/kernel": stddev for name, stddev in kernels.items()}
    names |= {f"embedding/{name}": stddev for name, stddev in tables.items()}
    return {name: np.asarray(stddev) for name, stddev in names.items()}


def close(draws: np.ndarray, stddev: float | np.ndarray) -> bool:
    near = abs(draws.std() / stddev - 1) < ERRORS * (2 * draws.size) ** -0.5
    return bool(near and abs(draws.mean()) < ERRORS * stddev * draws.size**-0.5)


@pytest.mark.parametrize("norm, initialisation", [
    *((norm, "xavier") for norm in GAINS), ("deepnorm", "largescale"), ("deepnorm", "normal"), ("pre", "normal"),
])  # fmt: skip
def test_every_parameter_has_its_scale(norm: Any, initialisation: Any) -> None:
    cfg = GLMConfig(
        L, D, N, F, V, S, norm=norm, position="learned_2d", initialisation=initialisation, embedding_norm=True
    )
    params, stddevs = paths(jax.jit(init, static_argnums=0)(cfg, jax.random.key(0))), expected(norm, initialisation)
    for name, array in params.items():
        if name not in stddevs:
            assert re.search("(scale|bias)$", name), name
            assert (array == name.endswith("/scale")).all(), name
        elif name.endswith("qkv/kernel"):  # [L, D, N, 3, K]
            of_heads = {(head, part): array[:, :, head, part] for head in range(N) for part in range(3)}
            assert all(close(draws, stddevs[name][place]) for place, draws in of_heads.items())
        else:
            assert close(array, stddevs[name]), (name, array.std() / stddevs[name])
    assert stddevs.keys() <= params.keys()


def test_parameters_and_layers_draw_for_themselves() -> None:
    cfg = GLMConfig(L, D, N, F, V, S, position="learned_2d")
    params = paths(jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)))
    drawn = [array.ravel() for name, array in params.items() if name.startswith("embedding")]
    drawn += [layer.ravel() for name, array in params.items() if name.endswith("kernel") for layer in array]
    for a, b in combinations(drawn, 2):
        size = min(len(a), len(b))
        assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < ERRORS * size**-0.5
