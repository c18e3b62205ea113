"""What several benchmarks share: flags, the model, packed rows, and the official classes as a side."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rounds import CORES

if TYPE_CHECKING:
    from glm_jax.data.rows.rows import Rows
    from glm_jax.model import GLMConfig

MODEL = {"layers": 8, "hidden": 512, "heads": 8, "ffn": 1360, "vocabulary": 8192}


def parser(about: str | None, numbers: Mapping[str, int]) -> argparse.ArgumentParser:
    """Return a parser with flags for numbers, with their defaults, and `--side`, which a side is started with."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"rounds": 7, **numbers}.items():
        made.add_argument(f"--{flag}", type=int, default=default)
    made.add_argument("--side", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def add_against(made: argparse.ArgumentParser) -> None:
    """Add the flag that names another checkout."""
    made.add_argument("--against", type=lambda path: Path(path).resolve(), help="a checkout of another commit")


def add_peer(made: argparse.ArgumentParser) -> None:
    """Add the flags of the official classes."""
    made.add_argument("--peer", choices=["torch"])
    made.add_argument("--peer-python", default=sys.executable, help="a Python that has torch and SwissArmyTransformer")


def has(module: str) -> bool:
    """Whether the glm_jax of this process, which may be an older commit's, has a module."""
    import glm_jax

    # An editable installation of another checkout would find what is missing here.
    return (Path(glm_jax.__path__[0]) / f"{module.replace('.', '/')}.py").exists()


def config(options: argparse.Namespace) -> GLMConfig:
    """Return the model."""
    from glm_jax.model import GLMConfig

    return GLMConfig(options.layers, options.hidden, options.heads, options.ffn, options.vocabulary)


def packed_rows(count: int, length: int, vocabulary: int) -> Rows[np.ndarray]:
    """Return rows [B, S] full of samples of 32 tokens to half a row, of which 10% to 90% are context."""
    from glm_jax.data.rows.rows import Rows

    random = np.random.default_rng(0)
    rows = Rows.empty(count, length, pad=0)
    rows.tokens[:] = random.integers(2, vocabulary, rows.tokens.shape)
    rows.targets[:] = random.integers(2, vocabulary, rows.tokens.shape)
    for row in range(count):
        start, segment = 0, 1
        while start < length:
            size = min(int(random.integers(32, max(33, length // 2 + 1))), length - start)
            divide, stop = start + int(size * random.uniform(0.1, 0.9)), start + size
            rows.positions[row, start:stop] = np.arange(size)
            rows.segments[row, start:stop] = segment
            rows.context[row, start:divide] = True
            rows.loss_mask[row, divide:stop] = 1
            start, segment = stop, segment + 1
    return rows


@contextlib.contextmanager
def for_peer(
    options: argparse.Namespace, words: Sequence[str], params: Callable[[], Any], rows: Callable[[], Any] | None = None
) -> Iterator[list[str]]:
    """Write the weights, and the rows, that the official side reads; yield the words of all sides, which say where."""
    if not options.peer:
        yield [*words]
        return
    from glm_jax.interop import sat

    with tempfile.TemporaryDirectory() as folder:
        sat.save(folder, config(options), params(), tensor_parallel=1, iteration=1, dtype="float32")
        if rows:
            np.savez(Path(folder) / "rows.npz", **rows()._asdict())
        yield [*words, "--folder", folder]


def official(options: argparse.Namespace, longest: int) -> Any:
    """Return the official model with the weights that `for_peer` wrote."""
    import official_torch

    sizes = {
        "num_layers": options.layers, "hidden_size": options.hidden, "inner_hidden_size": options.ffn,
        "num_attention_heads": options.heads, "vocab_size": options.vocabulary, "max_sequence_length": longest,
    }  # fmt: skip
    (checkpoint,) = options.folder.glob("*/mp_rank_00_model_states.pt")
    return official_torch.load(checkpoint, sizes, CORES)
