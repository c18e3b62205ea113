"""Time a training step on a CPU: ours, another commit's, the official torch classes', and a matrix product.

    python benchmarks/train.py [--rounds 7] [--against CHECKOUT] [--peer torch] [--stash layer] [--layers 8] ...

All train the same GLM in float32 from the same weights on the same packed [gMASK] rows with AdamW and clipping, on two
threads. `--against` names a checkout of another commit; `--peer torch` is GLM130B of SwissArmyTransformer 0.4.12 (see
official_torch.py). The lines give a step's seconds, its share of the rate of a 2,048 x 2,048 product in the same
rounds, and ratios of wall-clock and CPU seconds: medians with the smallest and the largest round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import machine
import numpy as np
import rounds
import shared
from rounds import Measured, Side, compare, interval

if TYPE_CHECKING:
    from glm_jax.data.rows.rows import Rows

LR = 1e-4
OURS, AGAINST, OFFICIAL = "ours", "ours, the other commit", "official"


def rows_of(options: argparse.Namespace) -> Rows[np.ndarray]:
    """Return the rows of a step."""
    return shared.packed_rows(options.rows, options.length, options.vocabulary)


def build(options: argparse.Namespace, **engine: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a jitted step of the glm_jax that this process finds, and its arguments; the first it replaces.

    `engine` are fields of its EngineConfig; without `attention` the core is a CPU's.
    """
    from glm_jax.config.data import OBJECTIVES
    from glm_jax.config.training import OptimizerConfig
    from glm_jax.engine import EngineConfig
    from glm_jax.parallel import mesh as meshes
    from glm_jax.training import step
    from glm_jax.training.state import StepConfig, create_state

    mesh = meshes.build(dict(zip(meshes.AXES, map(int, options.mesh.split(",")), strict=True)))
    glm = shared.config(options)
    chosen = {"schedule": options.schedule, "keep": options.stash, **engine}
    if "attention" not in chosen and shared.has("model.attention_cores"):  # not in older commits
        from glm_jax.model.attention_cores import choose

        chosen["attention"] = choose(glm, "cpu", options.length)
    cfg = StepConfig(EngineConfig(glm, options.vocabulary, len(OBJECTIVES), **chosen), OptimizerConfig(), None, seed=0)
    train, _ = step.compile_steps(cfg, mesh)
    rows = meshes.place(mesh, rows_of(options), options.microbatches)
    return train, (create_state(cfg, mesh), rows, step.controls(mesh, LR, 1.0), ())


def ours(options: argparse.Namespace) -> None:
    """Be our side."""
    if shared.has("startup"):  # not in older commits
        from glm_jax import startup

        startup.keep_memory()  # as the commands do, if `--allocator` says nothing
    train, (state, *rest) = build(options)

    def turn() -> dict[str, float]:
        nonlocal state
        state, metrics = train(state, *rest)
        return {"loss": float(metrics["sums"].loss.sum() / metrics["sums"].targets.sum())}

    rounds.serve(turn)


def official(options: argparse.Namespace) -> None:
    """Be the official side."""
    import official_torch

    theirs = shared.official(options, options.length)
    rounds.serve(official_torch.trainer(theirs, np.load(options.folder / "rows.npz"), LR))


def flops(options: argparse.Namespace) -> float:
    """Return the floating-point operations of a step's products, without recomputing: three times the forward pass.

    Attention counts whole, [S, S] scores, as the dense cores compute it.
    """
    a_token = options.layers * (
        4 * options.hidden**2 + 3 * options.hidden * options.ffn + 2 * options.length * options.hidden
    ) + (options.hidden * options.vocabulary)
    return 6.0 * a_token * options.rows * options.length


def sides(options: argparse.Namespace, words: Sequence[str]) -> list[Side]:
    """Return what takes turns."""
    allocator = {} if options.allocator == "default" else {"GLIBC_TUNABLES": options.allocator}
    mine = (__file__, *words, "--side", "ours")
    held = [rounds.script(OURS, *mine, environment=allocator)]
    if options.against:
        held += [rounds.script(AGAINST, *mine, tree=options.against, environment=allocator)]
    if options.peer:
        theirs = (__file__, *words, "--side", "official")
        held += [rounds.script(OFFICIAL, *theirs, python=options.peer_python, environment=allocator)]
    return [*held, machine.side("matmul")]


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    rate = [machine.MATMUL_FLOPS / seconds for seconds in measured.pop("matmul").seconds()]
    print(f"matmul: {statistics.median(rate) / 1e9:.0f} Gflop/s")
    for name, side in measured.items():
        share = [flops(options) / seconds / best for seconds, best in zip(side.seconds(), rate, strict=True)]
        print(f"{name}: {interval(side.seconds())} s a step, {interval(side.cpu_seconds())} CPU s, {interval(share)} "
              f"of the matmul's rate; loss {side.turns[-1].parts['loss']:.4f}")  # fmt: skip
        if name != OURS:
            print(compare(measured, name, OURS))


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = shared.parser(__doc__, {"rows": 4, "microbatches": 1, "length": 512, **shared.MODEL})
    parser.add_argument("--stash", default="layer")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--mesh", default="1,1,1", help="devices on the axes data, pipeline and tensor, emulated")
    shared.add_against(parser)
    shared.add_peer(parser)
    parser.add_argument("--allocator", default="default", help="GLIBC_TUNABLES of all sides")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    options = arguments(words)
    if options.side:
        return {"ours": ours, "official": official}[options.side](options)

    def params() -> object:
        import jax

        from glm_jax import model

        return model.init(shared.config(options), jax.random.key(0))

    with shared.for_peer(options, words, params, lambda: rows_of(options)) as words:
        report(options, rounds.measure(sides(options, words), options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
