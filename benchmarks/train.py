"""Time a training step on a CPU: ours, another commit's, the official torch classes', and a matrix product.

    python benchmarks/train.py [--rounds 7] [--against CHECKOUT] [--peer torch] [--stash layer] [--layers 8] ...

All train the same GLM in float32 from the same weights on the same packed [gMASK] rows with AdamW and clipping, on two
threads. `--against` names a checkout of another commit; `--peer torch` is GLM130B of SwissArmyTransformer 0.4.12 (see
official_torch.py). The lines give a step's seconds, its share of the rate of a 2,048 x 2,048 product in the same
rounds, and ratios of wall-clock and CPU seconds: medians with the smallest and the largest round.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rounds
from machine import MATMUL_FLOPS
from machine import sides as machine_sides
from rounds import CORES, Measured, Side, interval, ratios

if TYPE_CHECKING:
    from glm_jax.data.rows.rows import Rows
    from glm_jax.model import GLMConfig

LR = 1e-4
OURS, AGAINST, OFFICIAL = "ours", "ours, the other commit", "official"


def config(options: argparse.Namespace) -> GLMConfig:
    """Return the model."""
    from glm_jax.model import GLMConfig

    return GLMConfig(options.layers, options.hidden, options.heads, options.ffn, options.vocabulary)


def packed_rows(options: argparse.Namespace) -> Rows[np.ndarray]:
    """Return rows [B, S] that are full of samples of 32 to 256 tokens, of which 10% to 90% are context."""
    from glm_jax.data.rows.rows import Rows

    random = np.random.default_rng(0)
    rows = Rows.empty(options.rows, options.length, pad=0)
    rows.tokens[:] = random.integers(2, options.vocabulary, rows.tokens.shape)
    rows.targets[:] = random.integers(2, options.vocabulary, rows.tokens.shape)
    for row in range(options.rows):
        start, segment = 0, 1
        while start < options.length:
            size = min(int(random.integers(32, 257)), options.length - start)
            divide, stop = start + int(size * random.uniform(0.1, 0.9)), start + size
            rows.positions[row, start:stop] = np.arange(size)
            rows.segments[row, start:stop] = segment
            rows.context[row, start:divide] = True
            rows.loss_mask[row, divide:stop] = 1
            start, segment = stop, segment + 1
    return rows


def ours(options: argparse.Namespace) -> None:
    """Be our side, with the glm_jax that this process finds."""
    from glm_jax.config.data import OBJECTIVES
    from glm_jax.config.training import OptimizerConfig
    from glm_jax.engine import EngineConfig
    from glm_jax.parallel import mesh as meshes
    from glm_jax.training import step
    from glm_jax.training.state import StepConfig, create_state

    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    glm = config(options)
    chosen = {}
    if importlib.util.find_spec("glm_jax.model.attention_cores"):  # not in older commits
        from glm_jax.model.attention_cores import choose

        chosen["attention"] = choose(glm, "cpu", options.length)
    engine = EngineConfig(glm, options.vocabulary, len(OBJECTIVES), keep=options.stash, **chosen)
    cfg = StepConfig(engine, OptimizerConfig(), None, seed=0)
    state = create_state(cfg, mesh)
    train, _ = step.compile_steps(cfg, mesh)
    rows = meshes.place(mesh, packed_rows(options), options.microbatches)

    def turn() -> dict[str, float]:
        nonlocal state
        state, metrics = train(state, rows, step.controls(mesh, LR, 1.0), ())
        return {"loss": float(metrics["sums"].loss.sum() / metrics["sums"].targets.sum())}

    rounds.serve(turn)


def official(options: argparse.Namespace) -> None:
    """Be the official side."""
    import official_torch

    sizes = {
        "num_layers": options.layers, "hidden_size": options.hidden, "inner_hidden_size": options.ffn,
        "num_attention_heads": options.heads, "vocab_size": options.vocabulary, "max_sequence_length": options.length,
    }  # fmt: skip
    (checkpoint,) = options.folder.glob("*/mp_rank_00_model_states.pt")
    theirs = official_torch.load(checkpoint, sizes, CORES)
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
    here = {"JAX_PLATFORMS": "cpu", **allocator}

    def side(name: str, kind: str, tree: Path, python: str = sys.executable) -> Side:
        return Side(name, [python, __file__, *words, "--side", kind], {**here, "PYTHONPATH": str(tree)})

    tree = Path(__file__).resolve().parent.parent
    held = [side(OURS, "ours", tree)]
    if options.against:
        held.append(side(AGAINST, "ours", options.against.resolve()))
    if options.peer:
        held.append(side(OFFICIAL, "official", tree, options.peer_python))
    return [*held, *(side for side in machine_sides() if side.name == "matmul")]


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    rate = [MATMUL_FLOPS / seconds for seconds in measured.pop("matmul").seconds()]
    print(f"matmul: {statistics.median(rate) / 1e9:.0f} Gflop/s")
    for name, side in measured.items():
        share = [flops(options) / seconds / best for seconds, best in zip(side.seconds(), rate, strict=True)]
        print(f"{name}: {interval(side.seconds())} s a step, {interval(side.cpu_seconds())} CPU s, {interval(share)} "
              f"of the matmul's rate; loss {side.turns[-1].parts['loss']:.4f}")  # fmt: skip
        if name != OURS:
            base = measured[OURS]
            print(f"{name} / {OURS}: {ratios(side.seconds(), base.seconds())} of the seconds, "
                  f"{ratios(side.cpu_seconds(), base.cpu_seconds())} of the CPU seconds")  # fmt: skip


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rounds": 7, "rows": 4, "microbatches": 1, "length": 512, "layers": 8, "hidden": 512, "heads": 8}
    for flag, default in {**sizes, "ffn": 1360, "vocabulary": 8192}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--stash", default="layer")
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--peer", choices=["torch"])
    parser.add_argument(
        "--peer-python", default=sys.executable, help="a Python that has torch and SwissArmyTransformer"
    )
    parser.add_argument("--allocator", default="default", help="GLIBC_TUNABLES of all sides")
    parser.add_argument("--side", choices=["ours", "official"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    options = arguments(words)
    if options.side:
        return {"ours": ours, "official": official}[options.side](options)
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            import jax

            from glm_jax import model
            from glm_jax.interop import sat

            cfg = config(options)
            sat.save(folder, cfg, model.init(cfg, jax.random.key(0)), tensor_parallel=1, iteration=1, dtype="float32")
            np.savez(Path(folder) / "rows.npz", **packed_rows(options)._asdict())
            words = [*words, "--folder", folder]
        report(options, rounds.measure(sides(options, words), options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
