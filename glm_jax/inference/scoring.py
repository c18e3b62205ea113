"""Log-probabilities of given targets: rows of a context and what follows it, many at once on a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.engine import decode
from glm_jax.inference.batch import SHARES, Decoder, Layout, NotFinite, batch_limit, bucket, fetch, row_positions
from glm_jax.inference.prompts import Context
from glm_jax.model import GLMConfig
from glm_jax.parallel.devices import device_memory
from glm_jax.parallel.processes import compiled_together


class Row(NamedTuple):
    """A context and its targets.

    Several targets of one context, each in a block of its own, are scored in one pass.
    """

    tokens: list[int]
    positions: np.ndarray  # int32 [S], or [2, S] for learned_2d
    context: int  # how many tokens all others see; the rest see what is before them
    blocks: list[int]  # of each token: those of different blocks do not see each other, all see block 0
    places: list[int]  # the tokens whose logits count
    targets: list[int]  # what follows each of them


class Losses(NamedTuple):
    """What a row says about its targets."""

    nats: np.ndarray  # float32 [A], the loss of each
    likeliest: np.ndarray  # bool [A], whether no token is likelier


class Scored(NamedTuple):
    """The log-probability of a given target."""

    log_probability: float  # in nats, summed over its tokens
    tokens: int
    greedy: bool  # whether none of its tokens has a likelier one in its place

    @classmethod
    def of(cls, found: Losses) -> Scored:
        """Return the sum of a target's losses."""
        return cls(-float(found.nats.sum(dtype=np.float64)), len(found.nats), bool(found.likeliest.all()))


def row(cfg: GLMConfig, context: Context, target: Sequence[int]) -> Row:
    """Return the row of one target, of at least one token."""
    tokens = [*context.tokens, *target[:-1]]
    first = len(context.tokens) - 1
    seen = 0 if context.causal else first
    positions = row_positions(cfg, context, len(tokens))
    return Row(tokens, positions, seen, [0] * len(tokens), [*range(first, len(tokens))], [*target])


def score(decoder: Decoder, pairs: Sequence[tuple[Context, Sequence[int]]]) -> list[Scored]:
    """Return the log-probability of each pair's target. All processes must call this with the same pairs.

    Args:
        decoder: the model.
        pairs: a context, and the tokens of its target, at least one.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    found = dict(losses(decoder, [row(decoder.config.model, *pair) for pair in pairs]))
    return [Scored.of(found[number]) for number in range(len(pairs))]


def losses(decoder: Decoder, rows: Sequence[Row]) -> Iterator[tuple[int, Losses]]:
    """Score rows, the longest first. All processes must call this with the same rows.

    Args:
        decoder: the model.
        rows: any number of them.

    Yields:
        The number of a row, and the losses of its targets.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    order = sorted(range(len(rows)), key=lambda number: (-bucket(len(rows[number].tokens)), -len(rows[number].targets)))
    first = 0
    while first < len(order):
        width = rows_together(decoder, len(rows[order[first]].tokens))
        together = order[first : first + width]
        yield from zip(together, _losses(decoder, [rows[number] for number in together]), strict=True)
        first += width


def rows_together(decoder: Decoder, length: int) -> int:
    """Return how many rows of up to `length` tokens are scored together, so that scores of attention fit in memory."""
    sizes = decoder.mesh.shape
    scores = 3 * 4 * decoder.config.model.num_heads // sizes["tensor"] * bucket(length) ** 2  # bytes, of a row
    share = max([1, *(share for share in SHARES if share * scores <= device_memory() // 4)])
    return min(batch_limit(decoder), share * sizes["data"] * sizes["pipeline"])


def _losses(decoder: Decoder, rows: Sequence[Row]) -> list[Losses]:
    config, mesh = decoder.config, decoder.mesh
    layout = Layout.of(mesh, len(rows))
    whole = [*rows, *[rows[0]] * (layout.rows - len(rows))]
    length = bucket(max(len(one.tokens) for one in rows))
    width = bucket(max(len(one.targets) for one in rows), 4)
    tokens, blocks = np.zeros((2, len(whole), length), np.int32)
    places, targets = np.zeros((2, len(whole), width), np.int32)
    positions = np.zeros((len(whole), *rows[0].positions.shape[:-1], length), np.int32)
    for number, one in enumerate(whole):
        size, asked = len(one.tokens), len(one.targets)
        tokens[number, :size], blocks[number, :size] = one.tokens, one.blocks
        positions[number, ..., :size] = one.positions
        places[number, :asked], targets[number, :asked] = one.places, one.targets
    context = np.array([one.context for one in whole], np.int32)
    *parts, places, targets = layout.put(mesh, (tokens, positions, context, blocks, places, targets))
    prompts = decode.Prompts(*(parts if blocks.any() else parts[:-1]))
    found = compiled_together(decode.token_losses)(config, mesh, decoder.weights, prompts, places, targets)
    nats, likeliest = (array.reshape(len(whole), width) for array in fetch(mesh, found))
    sizes = [len(one.targets) for one in rows]
    kept = [Losses(nats[number, :size], likeliest[number, :size]) for number, size in enumerate(sizes)]
    if not all(np.isfinite(one.nats).all() for one in kept):
        raise NotFinite(f"the logits are not finite with the weights of {decoder.source}: the run has "
                        "diverged, use an earlier step")  # fmt: skip
    return kept
