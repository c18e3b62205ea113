"""The rows of an experiment, for training and held out."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.config import Experiment
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.corpora.shards import SHORTEST_TEXT
from glm_jax.data.rows.batches import Batches
from glm_jax.data.rows.blanks import find_sentence_ends
from glm_jax.data.rows.mixture import temperature_weights, with_weights


def training_batches(config: Experiment, prepared: Prepared) -> Batches:
    """Return the training batches of an experiment, a pure function of the row."""
    return Batches(
        {source: splits["train"] for source, splits in prepared.shards.items()},
        with_weights(config.data.weights or _weights(config, prepared), prepared.instruction_weights),
        prepared.tokenizer,
        config.data.seq_length,
        config.data.blanks.objectives(),
        config.seed if config.data.seed < 0 else config.data.seed,
        options=config.blank_options(),
        sentence_ends=_sentence_ends(config, prepared),
        instructions=prepared.instructions,
    )


def heldout_batches(config: Experiment, prepared: Prepared) -> dict[str, Batches]:
    """Return the held-out rows of each source that has enough; the blanks are always the same, whatever the history."""
    shares = {kind: share for kind, share in config.data.blanks.shares().items() if kind != "instruction"}
    return {
        source: Batches(
            {source: splits["heldout"]},
            {source: 1.0},
            prepared.tokenizer,
            config.data.seq_length,
            shares,
            0,
            options=dataclasses.replace(config.blank_options(), replacement=False),
            sentence_ends=_sentence_ends(config, prepared),
        )
        for source, splits in prepared.shards.items()
        if shares and splits["heldout"].lengths.sum() >= SHORTEST_TEXT
    }


def _weights(config: Experiment, prepared: Prepared) -> dict[str, float]:
    """Return the sources' weights, multiplied by the shares that the temperature gives their sizes."""
    if not config.data.temperature:
        return prepared.weights
    sizes = {source: float(splits["train"].lengths.sum()) for source, splits in prepared.shards.items()}
    shares = temperature_weights(sizes, config.data.temperature)
    return {source: weight * shares[source] for source, weight in prepared.weights.items()}


def _sentence_ends(config: Experiment, prepared: Prepared) -> np.ndarray | None:
    """Return which tokens end a sentence, bool [V], or None if no row ever blanks sentences."""
    blanks = config.data.blanks
    if not blanks.smask and not any("smask" in weights for _, weights in blanks.history):
        return None
    return find_sentence_ends([prepared.tokenizer.decode([token]) for token in range(prepared.tokenizer.size)])
