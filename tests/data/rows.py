"""Sources of made-up tokens, batches of them, and a check that rebuilds the text of batches."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.batches import Batches

SPECIAL: Any = SimpleNamespace(pad=0, eos=1, mask=2, gmask=3, smask=4, sop=5, eop=6, prefix=())
FIRST = 10
SHARES = {"mask": 0.3, "gmask": 0.7}


class Documents:
    """Documents in which all tokens of a source but eos differ."""

    def __init__(self, lengths, first=FIRST):
        self.lengths = np.array(lengths, np.int64)
        starts = first + np.cumsum(self.lengths) - self.lengths
        self._documents = [
            np.append(np.arange(start, start + length - 1), SPECIAL.eos).astype(np.int32)
            for start, length in zip(starts, lengths, strict=True)
        ]

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index]

    def stream(self):
        return np.concatenate(self._documents)


def build(sources=None, weights=None, seq_length=32, objectives=SHARES, seed=7, special=SPECIAL, **more):
    if sources is None:
        sources = {"en": Documents([50, 3, 400, 1000, 7]), "zh": Documents([600, 150], 5000)}
    weights = weights or dict.fromkeys(sources, 1.0)
    return Batches(sources, weights, special, seq_length, objectives, seed, **more)


def equal(left, right):
    return all(a.dtype == b.dtype and (a == b).all() for a, b in zip(left, right, strict=True))


def check_row(batch, b, options):
    """Check the contract of a batch on a row; return the text of each sample, rebuilt from the batch alone."""
    tokens, targets, segments = batch.tokens[b], batch.targets[b], batch.segments[b]
    context, loss_mask = batch.context[b], batch.loss_mask[b]
    positions = batch.positions[b]
    objective = OBJECTIVES[batch.objective[b]]
    blanks = {"mask": SPECIAL.mask, "gmask": SPECIAL.gmask, "smask": SPECIAL.smask, "instruction": SPECIAL.mask}
    blank, counts_on = blanks[objective], objective in ("gmask", "instruction")
    filled = segments > 0
    assert (np.diff(segments[filled]) >= 0).all() and filled[: filled.sum()].all()
    assert (tokens[~filled] == SPECIAL.pad).all() and not context[~filled].any()
    assert (loss_mask == (filled & ~context)).all()
    texts = []
    for segment in range(1, segments.max() + 1):
        places = np.flatnonzero(segments == segment)
        head = int(context[places].sum())
        assert context[places[:head]].all() and not context[places[head:]].any()
        assert positions[..., places[0]].max() == 0
        starts = [i for i in places[head:] if tokens[i] == SPECIAL.sop]
        blocks = {}
        for start, stop in zip(starts, [*starts[1:], places[-1] + 1], strict=True):
            body = targets[start:stop]
            assert (tokens[start + 1 : stop] == body[:-1]).all()
            if counts_on:
                assert (positions[start:stop] == np.arange(head, head + stop - start)).all()
                blocks[head - 1] = body
            else:
                assert len(set(positions[start:stop])) == 1
                blocks[positions[start]] = body
        text = []
        for i, place in enumerate(places[:head]):
            if tokens[place] != blank:
                text.append(tokens[place])
                continue
            body = blocks.pop(i)
            if objective != "gmask" or options.gmask_eop:
                assert body[-1] == SPECIAL.eop
                body = body[:-1]
            text.extend(body)
        assert not blocks
        texts.append(np.array(text))
    return texts


def least_cpu_seconds(make: Callable[[int], object], *firsts: int, turns: int = 20) -> list[float]:
    """Return, for each of `firsts`, the least CPU time of making something at it and the numbers that follow it.

    The numbers take turns. On a busy machine the time off the core does not count, and all turns slow down alike.
    """
    make(1000)  # pays the costs of a first call
    seconds: dict[int, list[float]] = {first: [] for first in firsts}
    for turn in range(turns):
        for first in firsts:
            start = time.process_time()
            make(first + turn)  # none was made before
            seconds[first].append(time.process_time() - start)
    return [min(seconds[first]) for first in firsts]
