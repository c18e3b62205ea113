"""Many requests at once on a mesh: rows in batches and groups, and shapes in buckets.

Shapes are powers of two, so that prompts of all lengths and batches of all sizes run a handful of compiled programs.
What a row gives depends neither on its neighbours nor on its place: attention never crosses rows, and each row draws
with a key of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.data.rows.blanks import sample_positions
from glm_jax.engine import decode
from glm_jax.engine.strategy import Strategy
from glm_jax.engine.weights import DecodeConfig, Weights
from glm_jax.errors import UserError
from glm_jax.inference import beams, sampling
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.prompts import Context
from glm_jax.inference.strategies import Beam, Generated, Request
from glm_jax.model import GLMConfig
from glm_jax.parallel.devices import device_memory
from glm_jax.parallel.processes import compiled_together
from glm_jax.types import Tree

Array = jax.Array

SHARES = (1, 4, 16, 32)  # how many prompts a group and member of `data` may have
ROWS = SHARES[-1]
SHORTEST = 32  # tokens, the smallest bucket


class NotFinite(UserError):
    """A model whose logits are infinite or not numbers."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model on a mesh, for decoding."""

    config: DecodeConfig
    mesh: jax.sharding.Mesh
    weights: Weights
    source: str = "the model"  # where the weights come from, for messages


class Job(NamedTuple):
    """A blank to fill."""

    context: Context
    request: Request
    later: int = 0  # places of the row that other blanks of the same context will need


def bucket(size: int, smallest: int = SHORTEST) -> int:
    """Return the smallest power of two that is at least `size`, from `smallest` on."""
    return max(smallest, 1 << (size - 1).bit_length())


def row_positions(cfg: GLMConfig, context: Context, length: int) -> np.ndarray:
    """Return the positions of a row of `length` tokens: int32 [T], or [2, T] for learned_2d.

    sop is the first token of the target. A fill repeats its blank's position, or continues to count ([gMASK]). The
    original GLM (learned_2d) always repeats, and counts in the second stream. Fills of the same context follow one
    another, as the spans of a sample do in training.
    """
    before = context.blank + 1 if context.causal else len(context.tokens) - 1
    repeat = context.repeats or cfg.position == "learned_2d"
    blanks, widths = zip(*context.earlier, (context.blank, 0), strict=True)
    widths = (*widths[:-1], length - before - sum(widths))
    streams = sample_positions(before, np.array(blanks), np.array(widths), repeat=repeat)
    if cfg.position != "learned_2d":
        return streams[0]
    # the padding behind the longest fill may lie beyond the tables, where a look-up gives NaN
    return np.minimum(np.stack(streams), cfg.max_length - 1)


def batch_limit(decoder: Decoder, beam_count: int = 1) -> int:
    """Return how many prompts are generated together, at most.

    The caches of their rows, at the model's full length, take no more than half of the memory that the weights leave,
    or there is one prompt; and there are at most ROWS rows in a group and member of `data`.
    """
    cfg, sizes, weights = decoder.config.model, decoder.mesh.shape, decoder.weights
    groups = sizes["pipeline"]
    held = sum(array.addressable_data(0).nbytes for array in jax.tree.leaves(weights))
    numbers = 2 * len(weights.layers) * groups * cfg.max_length * cfg.hidden_size // sizes["tensor"]  # of each row
    rows = (device_memory() - held) // 2 // (numbers * jnp.dtype(decoder.config.compute).itemsize)
    fitting = [share for share in SHARES if share * beam_count <= min(rows, ROWS)]
    return max([1, *fitting, *([ROWS // beam_count] if rows >= ROWS else [])]) * sizes["data"] * groups


class Layout(NamedTuple):
    """How rows lie in a batch: in groups, so that every stage of the pipeline has one, split over `data`."""

    groups: int  # M
    rows: int  # of all groups

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, count: int) -> Layout:
        """Return the layout of a batch with room for `count` rows."""
        groups = min(mesh.shape["pipeline"], bucket(count, 1))
        needed = -(-count // (groups * mesh.shape["data"]))  # rows of a group and member of `data`
        share = min(share for share in SHARES if share >= needed)
        return cls(groups, groups * share * mesh.shape["data"])

    def put(self, mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
        """Put host arrays [rows, ...], the same in all processes, on a mesh as [M, rows / M, ...]."""
        sharding = jax.NamedSharding(mesh, decode.GROUPS)

        def one(array: np.ndarray) -> Array:
            grouped = array.reshape(self.groups, len(array) // self.groups, *array.shape[1:])
            return jax.make_array_from_callback(grouped.shape, sharding, lambda index: grouped[index])

        return jax.tree.map(one, tree)


def fetch(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
    """Return arrays on a mesh as whole host arrays, in all processes."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), compiled_together(_replicate(mesh))(tree))


@functools.lru_cache(maxsize=8)
def _replicate(mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))


class Generation:
    """Blanks that are filled together. All processes of a mesh must make the same calls, with the same jobs."""

    def __init__(self, decoder: Decoder, jobs: Sequence[Job], vocabulary: Vocabulary) -> None:
        """Read the contexts.

        Args:
            decoder: the model.
            jobs: at most `batch_limit`, with strategies of one kind.
            vocabulary: of the model.

        Raises:
            UserError: an option names a token that is not in the vocabulary.
        """
        self._decoder, self._count, self._vocabulary = decoder, len(jobs), vocabulary
        options = jobs[0].request.options
        self._beams = options.count if isinstance(options, Beam) else 1
        self._layout = Layout.of(decoder.mesh, len(jobs))
        self._length = bucket(max(len(job.context.tokens) + job.request.limit + job.later for job in jobs))
        whole = self._padded(jobs)
        search = self._search([job.request for job in whole])
        self._prefill([job.context for job in whole], np.array([job.request.limit < 1 for job in whole]), search)

    def _padded(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs and as many idle ones as fill the rows of the batch."""
        idle = jobs[0]._replace(request=jobs[0].request._replace(limit=0))
        return [*jobs, *[idle] * (self._layout.rows - len(jobs))]

    def _search(self, requests: Sequence[Request]) -> Tree:
        """Turn to requests, and return their search before the first token, on the host."""
        self._strategy: Strategy
        if isinstance(requests[0].options, Beam):
            self._strategy, settings, search = beams.begin(requests, self._vocabulary, self._length)
            self._finish = functools.partial(beams.finish, settings)
        else:
            settings, search = sampling.begin(requests, self._vocabulary, self._length)
            finish_rows = functools.partial(sampling.finish, settings)
            self._strategy, self._finish = sampling.Sampler(), lambda search: [[row] for row in finish_rows(search)]
        self._settings = self._put(settings)
        return search

    def _put(self, tree: Tree) -> Tree:
        return self._layout.put(self._decoder.mesh, tree)

    def _rows(self, array: np.ndarray) -> Array:
        """Put an array with an entry for each prompt on the mesh, repeated for its beams."""
        return self._put(np.repeat(array, self._beams, axis=0))

    def _put_positions(self, contexts: Sequence[Context]) -> np.ndarray:
        """Put the positions of rows on the mesh, and return them."""
        cfg = self._decoder.config.model
        positions = np.stack([row_positions(cfg, context, self._length) for context in contexts])
        self._positions = self._rows(positions)
        return positions

    def _prefill(self, contexts: Sequence[Context], idle: np.ndarray, search: Tree) -> None:
        config, mesh, weights = self._decoder.config, self._decoder.mesh, self._decoder.weights
        lengths = np.array([len(context.tokens) - 1 for context in contexts], np.int32)  # without sop
        tokens = np.zeros((len(contexts), bucket(int(lengths.max()))), np.int32)
        for row, context in zip(tokens, contexts, strict=True):
            row[: len(context.tokens) - 1] = context.tokens[:-1]
        seen = np.array([0 if context.causal else len(context.tokens) - 1 for context in contexts], np.int32)
        prompts = decode.Prompts(*map(self._put, (tokens, self._put_positions(contexts), seen)))
        cache = compiled_together(decode.prefill)(config, mesh, weights, prompts)
        if self._beams > 1:
            cache = compiled_together(decode.repeat_rows)(mesh, cache, self._beams)
        last = np.array([context.tokens[-1] for context in contexts], np.int32)
        state = (self._rows(lengths), self._rows(last), self._rows(idle), self._put(search))
        self._state = decode.begin(mesh, cache, *state)

    def follow(self, jobs: Sequence[Job], last: Sequence[int]) -> None:
        """Turn to the next blank of each context, whose fill follows the earlier ones and sees them; not with beams.

        Args:
            jobs: of the same contexts in the same order, whose `earlier` says what the rows hold by now; a limit of 0
                is a context without another blank.
            last: the newest token that stays in each row.

        Raises:
            NotFinite: the model gives logits that are not finite.
        """
        whole = self._padded(jobs)
        contexts = [job.context for job in whole]
        ends = np.array([len(one.tokens) - 1 + sum(width for _, width in one.earlier) for one in contexts], np.int32)
        newest = np.array([*last, *[last[0]] * (len(whole) - len(jobs))], np.int32)
        sop = np.array([context.tokens[-1] for context in contexts], np.int32)
        idle, search = np.array([job.request.limit < 1 for job in whole]), self._search([job.request for job in whole])
        self._put_positions(contexts)

        def stand(lengths: np.ndarray, tokens: np.ndarray) -> None:
            parts = {"lengths": lengths, "tokens": tokens, "done": idle, "search": search}
            self._state = self._state._replace(**{name: self._put(part) for name, part in parts.items()})

        stand(ends - 1, newest)
        self.advance(1)  # the newest token may not be in the cache yet; what is chosen after it does not count
        stand(ends, sop)

    def advance(self, turns: int) -> None:
        """Generate up to `turns` tokens more in every row.

        Raises:
            NotFinite: the model gives logits that are not finite.
        """
        config, mesh, weights = self._decoder.config, self._decoder.mesh, self._decoder.weights
        settings, count = self._settings, np.int32(turns)
        self._state = compiled_together(decode.decode)(
            config, mesh, self._strategy, weights, self._state, self._positions, settings, count
        )
        if not fetch(mesh, self._state.search.finite).all():
            raise NotFinite(f"the logits are not finite with the weights of {self._decoder.source}: the run has "
                            "diverged, use an earlier step")  # fmt: skip

    def done(self) -> np.ndarray:
        """Return which jobs are done: bool [jobs]."""
        return fetch(self._decoder.mesh, self._state.search.done).ravel()[: self._count]

    def stop(self, jobs: np.ndarray) -> None:
        """End jobs, bool [jobs], before their time; not with beams."""
        ended = np.zeros(self._layout.rows, bool)
        ended[: len(jobs)] = jobs
        search = self._state.search
        done, again = compiled_together(_either)(search.done, self._put(ended))
        self._state = self._state._replace(done=done, search=search._replace(done=again))

    def results(self) -> list[list[Generated]]:
        """Return what each job has generated, best first: one sequence, or as many as there are beams."""
        search = fetch(self._decoder.mesh, self._state.search)
        return self._finish(jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), search))[: self._count]


def generate(
    generation: Generation, limit: int, turns: int, look: Callable[[np.ndarray], np.ndarray] | None = None
) -> None:
    """Generate up to `limit` tokens in every row, until all jobs are done.

    Args:
        generation: what to advance.
        limit: tokens, at most.
        turns: tokens between two looks.
        look: called with the jobs that are done, bool [jobs]; returns which others to end. Not with beams.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    while limit > 0:
        generation.advance(min(limit, turns))
        limit -= turns
        ended = generation.done()
        if look is not None:
            stopped = look(ended)
            if stopped.any():
                generation.stop(stopped)
            ended = ended | stopped  # what comes from a device is read-only
        if ended.all():
            return


@jax.jit
def _either(left: Array, right: Array) -> tuple[Array, Array]:
    return left | right, left | right  # in two places, since decoding takes both over
