"""Time attention on a CPU, forward and backward: block by block, dense, and another commit's dense core.

    python benchmarks/attention.py [--rounds 7] [--length 512 2048] [--memory 4096] [--rows 4] [--heads 8] [--dim 64]
        [--dropout 0] [--against CHECKOUT]

The rows are full of packed samples of 32 to half as many tokens as a row has. The lines are medians with the smallest
and the largest round, and the temporary bytes of the compiled programs. `--length` takes several, each with the same
number of tokens in all, `--rows` of the first; `--memory` is a length of one row that is only compiled.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import rounds
import shared
from rounds import Measured, compare, interval

OURS, DENSE, AGAINST = "blockwise", "reference", "reference of the other commit"
AT = " at "


def program(core_name: str, options: argparse.Namespace, rows: int, length: int) -> tuple[Any, Any]:
    """Return the compiled program of one side, with the glm_jax that this process finds, and its arguments."""
    import jax
    import jax.numpy as jnp

    from glm_jax.model import GLMConfig, Visibility
    from glm_jax.model.attention_core import reference

    core = reference
    if core_name == OURS:
        from glm_jax.model.attention_blockwise import blockwise as core
    cfg = GLMConfig(1, options.heads * options.dim, options.heads, 8, 64, attention_dropout=options.dropout)
    batch = shared.packed_rows(rows, length, cfg.vocab_size)
    visibility = Visibility(jnp.asarray(batch.segments), jnp.asarray(batch.context))
    by_head = (rows, options.heads, length, options.dim)
    by_token = (rows, length, options.heads, options.dim)
    drops = jax.random.split(jax.random.key(1), rows) if options.dropout else None
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(keys[i], shape) for i, shape in enumerate((by_token, by_head, by_head, by_token))]

    @jax.jit
    def both(queries: jax.Array, keys: jax.Array, values: jax.Array, gradient: jax.Array) -> object:
        def mix(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return core(cfg, queries, keys, values, visibility, None, jnp.int32(0), jnp.arange(options.heads), drops)

        mixed, pull = jax.vjp(mix, queries, keys, values)
        return mixed, pull(gradient)

    return both.lower(*arrays).compile(), arrays


def temporaries(compiled: Any) -> int:
    """Return the temporary bytes of a compiled program."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)


def serve(options: argparse.Namespace) -> None:
    """Be one side."""
    import jax

    name, length = options.side.split(AT)
    compiled, arrays = program(name, options, options.rows * options.length[0] // int(length), int(length))

    def turn() -> dict[str, float]:
        jax.block_until_ready(compiled(*arrays))
        return {}

    rounds.serve(turn, lambda: {"temporaries": temporaries(compiled)})


def report(measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    for name, side in measured.items():
        milliseconds = [1e3 * seconds for seconds in side.seconds()]
        print(f"{name}: {interval(milliseconds, 1)} ms, {side.about['temporaries'] / 1e6:.1f} MB of temporaries")
        base = OURS + AT + name.split(AT)[1]
        if name != base:
            print(compare(measured, name, base))


def report_memory(options: argparse.Namespace) -> None:
    """Print the temporary bytes of both cores for one row that is not computed."""
    sizes = [temporaries(program(core, options, 1, options.memory)[0]) for core in (OURS, DENSE)]
    print(f"one row of {options.memory}: {OURS} takes {sizes[0] / 1e6:.1f} MB of temporaries, {DENSE} "
          f"{sizes[1] / 1e6:.1f} MB: {sizes[1] / sizes[0]:.1f} times as much")  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    parser = shared.parser(__doc__, {"rows": 4, "heads": 8, "dim": 64, "memory": 0})
    parser.add_argument("--length", type=int, nargs="+", default=[512])
    parser.add_argument("--dropout", type=float, default=0.0)
    shared.add_against(parser)
    options = parser.parse_args(words)
    if options.side:
        return serve(options)
    trees = {OURS: rounds.TREE, DENSE: rounds.TREE} | ({AGAINST: options.against} if options.against else {})
    sides = [
        rounds.script(side, __file__, *words, "--side", side, tree=tree)
        for length in options.length
        for name, tree in trees.items()
        for side in [f"{name}{AT}{length}"]
    ]
    report(rounds.measure(sides, options.rounds))
    if options.memory:
        report_memory(options)
    return None


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
