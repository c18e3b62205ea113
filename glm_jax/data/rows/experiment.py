"""The rows of an experiment, for training and held out."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.config import Experiment
from glm_jax.config.data import Blanks
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.corpora.shards import SHORTEST_TEXT
from glm_jax.data.rows.batches import Batches
from glm_jax.data.rows.blanks import find_sentence_ends
from glm_jax.data.rows.mixture import temperature_weights, with_weights


def training_batches(config: Experiment, prepared: Prepared) -> Batches:
    """Return the training batches of an experiment, a pure function of the row."""
    return Batches(
        {source: splits["train"] for source, splits in prepared.shards.items()},
        with_weights(config.data.weights or {}, {**_weights(config, prepared), **prepared.instruction_weights}),
        prepared.tokenizer,
        config.data.seq_length,
        config.data.blanks.objectives(),
        config.seed if config.data.seed < 0 else config.data.seed,
        options=config.blank_options(),
        sentence_ends=_sentence_ends(config, prepared),
        instructions={name: prepared.instructions[name].train for name in prepared.instruction_weights},
    )


def heldout_batches(config: Experiment, prepared: Prepared) -> dict[str, Batches]:
    """Return the held-out rows of each source that has enough; the blanks are always the same, whatever the history.

    If no blanks have a share, as in training on answers alone, they are drawn with the shares of the keys' defaults.
    """
    shares = _blanked(config.data.blanks) or _blanked(Blanks())
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
        if splits["heldout"].lengths.sum() >= SHORTEST_TEXT
    }


def heldout_answers(config: Experiment, prepared: Prepared) -> dict[str, Batches]:
    """Return the rows of each set's held-out prompts and answers, if it has any; they are always the same."""
    return {
        name: Batches(
            {},
            {name: 1.0},
            prepared.tokenizer,
            config.data.seq_length,
            {"instruction": 1.0},
            0,
            options=config.blank_options(),
            instructions={name: sides.heldout},
        )
        for name, sides in prepared.instructions.items()
        if len(sides.heldout)
    }


def _blanked(blanks: Blanks) -> dict[str, float]:
    return {kind: share for kind, share in blanks.shares().items() if kind != "instruction"}


def _weights(config: Experiment, prepared: Prepared) -> dict[str, float]:
    """Return the sources' weights, multiplied by the shares that the temperature gives their sizes."""
    if not config.data.temperature or not prepared.weights:
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
