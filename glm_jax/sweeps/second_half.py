"""A measure for members with different objectives: the loss on the second half of a text, given the first half.

Every member predicts the same tokens from the same preceding tokens. A member trained on [gMASK] suffixes sees the
first half as context, all at once or, with data.blanks.causal_context, from left to right. A member trained only on
whole texts as targets is unidirectional: it reads the first half from left to right, as in training, and its loss there
does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from glm_jax.config import Experiment, with_changes
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.blanks import Sample, blank_one, with_prefix
from glm_jax.data.rows.experiment import heldout_batches
from glm_jax.data.rows.rows import Rows

NAME = "loss/second_half"

GMASK_ALONE = {"data.blanks.mask": 0.0, "data.blanks.smask": 0.0, "data.blanks.gmask": 1.0,
               "data.blanks.instruction": 0.0, "data.blanks.history": ()}  # fmt: skip


def is_unidirectional(config: Experiment) -> bool:
    """Whether every training row is one [gMASK] target without context."""
    blanks = config.data.blanks
    others = blanks.mask + blanks.smask + blanks.instruction
    return blanks.gmask > 0 and not others and blanks.gmask_min_ratio == 1.0 and not blanks.history


def applies(config: Experiment) -> bool:
    """Whether a member learns to continue a text: some of its rows are [gMASK] rows."""
    return config.data.blanks.gmask > 0 and not config.data.blanks.history


def batches(config: Experiment, prepared: Prepared) -> Iterator[Rows[np.ndarray]]:
    """Yield the held-out rows of all sources in batches of a microbatch's rows, the same texts for every member."""
    rows = config.train.global_batch // config.train.microbatches
    for held in heldout_batches(with_changes(config, GMASK_ALONE), prepared).values():
        count = min(config.train.eval_rows, held.rows_per_epoch) // rows * rows
        for first in range(0, count, rows):
            texts = [held.text(held.locate(row)) for row in range(first, first + rows)]
            yield make_batch(texts, config, prepared)


def make_batch(texts: list[np.ndarray], config: Experiment, prepared: Prepared) -> Rows[np.ndarray]:
    """Return a batch of texts, int32 [n] each, in which only the second halves count."""
    two_streams = config.model.position == "learned_2d"
    batch = Rows.empty(len(texts), config.data.seq_length, prepared.tokenizer.pad, two_streams=two_streams)
    for b, text in enumerate(texts):
        sample, counted = _sample(text, config, prepared, two_streams)
        batch.fill(b, [sample], "gmask")
        batch.loss_mask[b, :counted] = 0
    return batch.causal() if config.data.blanks.causal_context else batch


def _sample(text: np.ndarray, config: Experiment, prepared: Prepared, two_streams: bool) -> tuple[Sample, int]:
    """Return the sample of a text, and the first place that counts in it."""
    special, end = prepared.tokenizer, config.data.blanks.gmask_eop
    half = len(text) // 2
    start = 0 if is_unidirectional(config) else half
    sample = with_prefix(blank_one(text, start, len(text), special.gmask, special, two_streams, end), special.prefix)
    return sample, sample.context + half - start


def evaluate(
    config: Experiment,
    prepared: Prepared,
    losses: Callable[[Rows[np.ndarray]], np.ndarray],
) -> dict[str, float]:
    """Return `loss/second_half` in nats a token; empty if it does not apply, or nothing is held out.

    Args:
        config, prepared: of the member.
        losses: returns the loss of every target token, [1, B, S], for a batch of arrays [1, B, ...].
    """
    if not applies(config):
        return {}
    nats, targets = 0.0, 0.0
    for batch in batches(config, prepared):
        one = Rows(*(array[None] for array in batch))  # a microbatch
        nats += float(np.asarray(losses(one), np.float64).sum())
        targets += float(batch.loss_mask.sum())
    return {NAME: nats / targets} if targets else {}
