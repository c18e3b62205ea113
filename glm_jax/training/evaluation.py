"""Batches of a run's sources, and the loss on what was held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm_jax.config import Experiment
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.batches import Batches
from glm_jax.data.rows.blanks import find_sentence_ends
from glm_jax.data.rows.mixture import temperature_weights, with_weights
from glm_jax.data.rows.rows import Rows
from glm_jax.parallel import mesh as meshes

SHORTEST_TEXT = 16  # tokens; with fewer held out, a source is not evaluated


def training_batches(config: Experiment, prepared: Prepared) -> Batches:
    """Return the batches of a run, a pure function of the row."""
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
    """Return the held-out rows of each source that has any; the same blanks every time, whatever the history."""
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
    """Return the sources' weights, times what the temperature makes of their sizes."""
    if not config.data.temperature:
        return prepared.weights
    sizes = {source: float(splits["train"].lengths.sum()) for source, splits in prepared.shards.items()}
    shares = temperature_weights(sizes, config.data.temperature)
    return {source: weight * shares[source] for source, weight in prepared.weights.items()}


def _sentence_ends(config: Experiment, prepared: Prepared) -> np.ndarray | None:
    """Return which tokens end a sentence, where some rows may blank sentences."""
    blanks = config.data.blanks
    if not blanks.smask and not any("smask" in weights for _, weights in blanks.history):
        return None
    return find_sentence_ends([prepared.tokenizer.decode([token]) for token in range(prepared.tokenizer.size)])


class Evaluation:
    """The held-out loss of every source, always over the same rows with the same blanks."""

    def __init__(self, config: Experiment, prepared: Prepared, mesh: jax.sharding.Mesh) -> None:
        self._mesh = mesh
        self._rows = config.train.global_batch // config.train.microbatches
        self._limit = config.train.eval_rows
        self._batches = heldout_batches(config, prepared)
        self._token_bytes = prepared.tokenizer.token_bytes

    def run(self, evaluate: Callable[[Any, Rows[jax.Array]], Any], params: Any, step: int) -> dict[str, Any]:
        """Return the event: `loss` over all, `loss/<source>` in nats a target token, `bits_per_byte/<source>`."""
        event: dict[str, Any] = {"event": "evaluation", "step": step}
        total, count = 0.0, 0.0
        mine = meshes.local_rows(self._mesh, self._rows, 1).reshape(-1)
        for source, batches in self._batches.items():
            nats, targets, size = 0.0, 0.0, 0.0
            rows = min(self._limit, max(batches.rows_per_epoch, 1))  # a short text makes one row, partly empty
            for first in range(0, rows, self._rows):
                batch = batches.at(first, min(self._rows, rows - first)).pad(self._rows)
                placed = meshes.place(self._mesh, batch.take(mine), 1)
                losses = np.asarray(evaluate(params, placed)[0], np.float64)  # [B, S]
                nats += losses.sum()
                targets += batch.loss_mask.sum()
                size += (self._token_bytes[batch.targets] * batch.loss_mask).sum()
            event[f"loss/{source}"] = float(nats / targets)
            event[f"bits_per_byte/{source}"] = float(nats / math.log(2) / size)
            total, count = total + nats, count + targets
        if count:
            event["loss"] = float(total / count)
        return event
