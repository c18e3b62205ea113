"""Beam search by the rules of the released GLM-130B, on the device, for several prompts at once.

A step takes the best (end tokens + 1) * W continuations of a prompt's W beams by summed log-probability and walks
through them, best first. An end token moves its beam to the list of finished beams; any other continuation fills one
of W places. The walk stops at the first continuation that is no end token and finds no place, so an end token counts
even if it is not the best continuation of its beam. The list keeps the W best by sum / ((5 + length) / 6)^penalty. A
prompt is done at its limit, or when its list is full and the best live beam, scored by the same formula, would not
enter it.

`length` counts the whole sequence: context, sop, generated tokens and the end token. That is the official formula; it
makes the penalty weaker the longer the context is. The official evaluation counts padding, too, and takes the zeros of
the padding for the tokens before the first generated one. Both are quirks; to get them, replace `context` and `prefix`
in `Settings`.

Every array has a leading axis of Q prompts. Rows of logits are prompt by prompt: row = prompt * W + beam.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.engine.strategy import Choice
from glm_jax.inference import constraints
from glm_jax.inference.constraints import A, Constraints, Vocabulary
from glm_jax.inference.strategies import Beam, Generated, Request

Array = jax.Array
N = TypeVar("N", jax.Array, np.ndarray)


class Settings(NamedTuple, Generic[A]):
    """What does not change while Q prompts are searched."""

    constraints: Constraints[A]  # of prompts
    key: A  # uint32 [Q, 2], raw data of a threefry key
    length_penalty: A  # float32 [Q]
    context: A  # int32 [Q], tokens before the generated ones, for the length
    prefix: A  # int32 [Q, n - 1], the last of them, for the n-gram ban; -1 where there are fewer


class Beams(NamedTuple, Generic[A]):
    """W sequences of each prompt; a score of -inf marks an empty place."""

    tokens: A  # int32 [Q, W, R]
    log_probabilities: A  # float32 [Q, W, R], the model's own
    scores: A  # float32 [Q, W]
    generated: A  # int32 [Q, W], tokens generated


class Search(NamedTuple, Generic[A]):
    """The search of Q prompts so far."""

    live: Beams[A]  # scores are sums of log-probabilities, under the constraints
    finished: Beams[A]  # best first, scores with the length penalty
    done: A  # bool [Q]
    finite: A  # bool [Q], whether all logits were; a prompt whose logits are not is done


def begin(
    requests: Sequence[Request], vocabulary: Vocabulary, room: int
) -> tuple[BeamSearch, Settings[np.ndarray], Search[np.ndarray]]:
    """Return the strategy of requests, their settings, and the search before the first token, in numpy.

    Args:
        requests: with `Beam` options that differ in numbers only: `count`, `no_repeat_ngram` and `deterministic` are
            compiled in, so they are the same for all.
        vocabulary: of the model.
        room: R, at least the largest limit; prompts with a limit of 0 are done.

    Raises:
        UserError: see `constraints.build`.
        ValueError: requests that cannot be searched together, or need more room.
    """
    options = [one.options for one in requests if isinstance(one.options, Beam)]
    ends = len(set(vocabulary.ends))
    strategies = {BeamSearch(one.count, ends, one.no_repeat_ngram, one.deterministic) for one in options}
    if len(options) != len(requests) or len(strategies) != 1:
        raise ValueError("requests of one beam search need Beam options of one count, n-gram and way of choosing")
    strategy = strategies.pop()
    prompts, width, before = len(requests), strategy.width, max(strategy.ngram - 1, 0)
    prefix = np.full((prompts, before), -1, np.int32)
    for row, (context, *_) in zip(prefix, requests, strict=True):
        known = context[max(len(context) - before, 0) :]
        row[before - len(known) :] = known
    settings = Settings(
        constraints=constraints.build(requests, vocabulary, room),
        key=np.array([one.key for one in requests], np.uint32).reshape(prompts, 2),
        length_penalty=np.array([one.length_penalty for one in options], np.float32),
        context=np.array([len(one.context) for one in requests], np.int32),
        prefix=prefix,
    )
    empty = Beams(
        tokens=np.zeros((prompts, width, room), np.int32),
        log_probabilities=np.zeros((prompts, width, room), np.float32),
        scores=np.full((prompts, width), -np.inf, np.float32),
        generated=np.zeros((prompts, width), np.int32),
    )
    one_beam = np.where(np.arange(width) == 0, np.float32(0.0), np.float32(-np.inf))  # all are the same before a token
    live = empty._replace(scores=np.tile(one_beam, (prompts, 1)))
    done = settings.constraints.limit < 1
    return strategy, settings, Search(live, empty, done, np.ones(prompts, bool))


def finish(settings: Settings[A], search: Search[A]) -> list[list[Generated]]:
    """Return each prompt's sequences, best first: finished beams, and live ones by the same formula.

    `search.finite` says which prompts mean something.
    """
    live, finished = (Beams(*map(np.asarray, beams)) for beams in (search.live, search.finished))
    length = np.asarray(settings.context)[:, None] + live.generated  # [Q, W]
    scores = live.scores / _penalty(length, np.asarray(settings.length_penalty)[:, None])  # [Q, W]
    results: list[list[Generated]] = []
    for prompt in range(len(scores)):
        found = [
            *_generated(Beams(*(array[prompt] for array in finished)), ended=True),
            *_generated(Beams(*(array[prompt] for array in live._replace(scores=scores))), ended=False),
        ]
        best_first = sorted(found, key=operator.attrgetter("score"), reverse=True)  # stable: ended before live
        results.append(best_first[: scores.shape[1]])
    return results


def _generated(beams: Beams[np.ndarray], ended: bool) -> list[Generated]:
    """Return the sequences of one prompt, without empty places."""
    columns = beams.tokens, beams.log_probabilities, beams.scores, beams.generated
    return [
        Generated(tokens[:count].tolist(), log_probabilities[:count].tolist(), float(score), ended)
        for tokens, log_probabilities, score, count in zip(*columns, strict=True)
        if score > -np.inf
    ]


def _penalty(length: N, power: N) -> N:
    """Return what divides the sum of a beam of so many tokens (GNMT, arXiv 1609.08144, equation 14)."""
    return ((5.0 + length.astype(np.float32)) / 6.0) ** power


def without_repeats(logits: Array, prefix: Array, tokens: Array, count: Array) -> Array:
    """Return logits with -inf for every token that would repeat an n-gram.

    An n-gram counts if its last token was generated; the tokens before that one may belong to the context.

    Args:
        logits: float32 [V].
        prefix: int32 [n - 1], the last tokens of the context.
        tokens: int32 [R], the first `count` are generated.
        count: int32 [].
    """
    before, room = prefix.shape[0], tokens.shape[0]
    sequence = jnp.concatenate([prefix, tokens])  # [n - 1 + R]
    windows = sequence[jnp.arange(room)[:, None] + jnp.arange(before)]  # [R, n - 1], what stood before each token
    newest = jax.lax.dynamic_slice_in_dim(sequence, count, before)  # [n - 1]
    repeats = (windows == newest).all(1) & (jnp.arange(room) < count)  # [R]
    return logits.at[jnp.where(repeats, tokens, logits.shape[0])].set(-jnp.inf, mode="drop")


class _Continuations(NamedTuple):
    """The C best continuations of one prompt's beams, best first, and where they go."""

    scores: Array  # float32 [C], summed log-probabilities
    parents: Array  # int32 [C]
    tokens: Array  # int32 [C]
    lives: Array  # bool [C], takes one of the W places
    ends: Array  # bool [C], joins the list of finished beams


@dataclass(frozen=True)
class BeamSearch:
    """The strategy of prompts with `width` rows each (see `glm_jax.engine.strategy`).

    Attributes:
        width: W, beams of a prompt.
        ends: how many end tokens there are.
        ngram: n of the n-gram ban; 0 disables.
        deterministic: False draws the continuations, without replacement, from the softmax of the summed
            log-probabilities, instead of taking the best.
    """

    width: int
    ends: int
    ngram: int = 0
    deterministic: bool = True

    def choose(self, logits: Array, settings: Settings[Array], search: Search[Array]) -> tuple[Choice, Search[Array]]:
        """Choose the next token of each row from logits, float32 [B, V]; the parents of a prompt's rows are its own."""
        prompts = search.done.shape[0]
        of_prompts = logits.reshape(prompts, self.width, -1)  # [Q, W, V]
        tokens, parents, following = jax.vmap(self._step)(of_prompts, settings, search)  # [Q, W]
        rows = parents + self.width * jnp.arange(prompts, dtype=jnp.int32)[:, None]  # [Q, W]
        return Choice(tokens.ravel(), rows.ravel(), jnp.repeat(following.done, self.width)), following

    def _step(
        self, logits: Array, settings: Settings[Array], search: Search[Array]
    ) -> tuple[Array, Array, Search[Array]]:
        """Advance one prompt: logits [W, V], settings and search without their leading axis."""
        rules, live = settings.constraints, search.live
        own, finite = jax.vmap(constraints.model_log_probabilities, (0, None))(logits, rules.size)  # [W, V], [W]
        finite = (finite | jnp.isneginf(live.scores)).all()
        walk = self._walk(self._sums(logits, settings, live), settings, live.generated[0])
        continued = _continue(live, walk, own)  # [C, ...]
        penalty = _penalty(settings.context + continued.generated[0], settings.length_penalty)
        finished = _best_finished(continued, walk.ends, penalty, search.finished)
        order = jnp.arange(len(walk.lives))
        places = jnp.sort(jnp.where(walk.lives, order, len(order)))[: self.width]  # [W], in the walk
        filled, places = places < len(order), jnp.minimum(places, len(order) - 1)  # [W]
        following = Beams(*(array[places] for array in continued))
        following = following._replace(scores=jnp.where(filled, following.scores, -jnp.inf))
        worst, best = finished.scores[-1], following.scores[0] / penalty  # of an empty place: -inf
        done = ~filled[0] | ((worst > -jnp.inf) & (worst >= best)) | (following.generated[0] >= rules.limit)
        active = ~search.done & finite
        stepped = Search(following, finished, done, jnp.bool_(True))
        frozen = search._replace(done=search.done | ~finite, finite=search.finite & (search.done | finite))
        kept = jax.tree.map(lambda new, old: jnp.where(active, new, old), stepped, frozen)
        parents = jnp.where(active, walk.parents[places], jnp.arange(self.width, dtype=jnp.int32))
        return walk.tokens[places], parents, kept

    def _sums(self, logits: Array, settings: Settings[Array], live: Beams[Array]) -> Array:
        """Return the summed log-probability of every continuation: float32 [W, V]."""
        rules = settings.constraints
        allowed = jax.vmap(constraints.constrained, (0, None, 0, 0))(
            logits, rules, live.tokens, live.generated
        )  # [W, V]
        if self.ngram:
            ban = jax.vmap(without_repeats, (0, None, 0, 0))
            allowed = ban(allowed, settings.prefix, live.tokens, live.generated)
        sums = live.scores[:, None] + jax.nn.log_softmax(allowed)  # [W, V]
        # a beam without any token left has a softmax of nan, an empty place anything
        return jnp.where(jnp.isneginf(allowed) | jnp.isneginf(live.scores[:, None]), -jnp.inf, sums)

    def _walk(self, sums: Array, settings: Settings[Array], count: Array) -> _Continuations:
        """Choose continuations of the beams, and walk through them, best first."""
        number = min((self.ends + 1) * self.width, sums.size)  # C
        if self.deterministic:
            scores, places = jax.lax.top_k(sums.ravel(), number)  # [C]
        else:
            key = jax.random.fold_in(jax.random.wrap_key_data(settings.key, impl="threefry2x32"), count)
            _, drawn = jax.lax.top_k(sums.ravel() + jax.random.gumbel(key, (sums.size,)), number)  # Gumbel top-k
            scores, order = jax.lax.top_k(sums.ravel()[drawn], number)
            places = drawn[order]
        parents, tokens = jnp.divmod(places, sums.shape[1])  # [C]
        ends = settings.constraints.ends[tokens]  # [C]
        reached = (jnp.cumsum(~ends) <= self.width) & (scores > -jnp.inf)  # [C]
        return _Continuations(scores, parents, tokens, reached & ~ends, reached & ends)


def _continue(live: Beams[Array], walk: _Continuations, own: Array) -> Beams[Array]:
    """Return the beams of one prompt with their continuations: C of them."""
    count = live.generated[0]  # all are of one length
    parents = walk.parents
    return Beams(
        tokens=live.tokens[parents].at[:, count].set(walk.tokens, mode="drop"),
        log_probabilities=live.log_probabilities[parents].at[:, count].set(own[parents, walk.tokens], mode="drop"),
        scores=walk.scores,
        generated=live.generated[parents] + 1,
    )


def _best_finished(continued: Beams[Array], ends: Array, penalty: Array, finished: Beams[Array]) -> Beams[Array]:
    """Merge the beams that end now into the list of one prompt; the newer comes first where scores are equal."""
    scores = jnp.where(ends, continued.scores / penalty, -jnp.inf)  # [C]
    newest_first = jax.tree.map(lambda array: array[::-1], continued._replace(scores=scores))
    every = jax.tree.map(lambda new, old: jnp.concatenate([new, old]), newest_first, finished)  # [C + W, ...]
    _, best = jax.lax.top_k(every.scores, len(finished.scores))  # [W]; the first of equals first
    return jax.tree.map(lambda array: array[best], every)
