"""Batches of a run's sources, and the loss on what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from glm_jax.config import Config
from glm_jax.data.batches import Batches
from glm_jax.data.blanks import BlankOptions
from glm_jax.data.prepare import Prepared
from glm_jax.parallel import mesh as meshes

SHORTEST_TEXT = 16  # tokens; with fewer held out, a source is not evaluated


def training_batches(config: Config, prepared: Prepared) -> Batches:
    """Give the batches of a run, a pure function of the row."""
    return _batches(config, prepared, "train", prepared.weights, config.seed)


def heldout_batches(config: Config, prepared: Prepared) -> dict[str, Batches]:
    """Give the held-out rows of each source that has any; the same blanks every time."""
    return {
        source: _batches(config, prepared, "heldout", {source: 1.0}, 0)
        for source, splits in prepared.shards.items()
        if splits["heldout"].lengths.sum() >= SHORTEST_TEXT
    }


def _batches(config: Config, prepared: Prepared, split: str, weights: Mapping[str, float], seed: int) -> Batches:
    return Batches(
        {source: prepared.shards[source][split] for source in weights},
        weights,
        prepared.tokenizer,
        config.data.seq_length,
        config.data.blanks.to_dict(),
        seed,
        options=BlankOptions(two_streams=config.model.position == "learned_2d"),
    )


class Evaluation:
    """The held-out loss of every source, always over the same rows with the same blanks."""

    def __init__(self, config: Config, prepared: Prepared, mesh: jax.sharding.Mesh) -> None:
        self._mesh = mesh
        self._rows = config.train.global_batch // config.train.microbatches
        self._limit = config.train.eval_rows
        self._batches = heldout_batches(config, prepared)
        self._token_bytes = prepared.tokenizer.token_bytes

    def run(self, evaluate: Callable[[Any, Mapping[str, Any]], Any], params: Any, step: int) -> dict[str, Any]:
        """Give the event: `loss` over all, `loss/<source>` in nats a target token, `bits_per_byte/<source>`."""
        event: dict[str, Any] = {"event": "evaluation", "step": step}
        total, count = 0.0, 0.0
        for source, batches in self._batches.items():
            nats, targets, size = 0.0, 0.0, 0.0
            rows = min(self._limit, max(batches.rows_per_epoch, 1))  # a short text makes one row, partly empty
            for first in range(0, rows, self._rows):
                batch = _pad_rows(batches.at(first, min(self._rows, rows - first)), self._rows)
                losses = np.asarray(evaluate(params, meshes.place(self._mesh, batch, 1))[0], np.float64)  # [B, S]
                nats += losses.sum()
                targets += batch["loss_mask"].sum()
                size += (self._token_bytes[batch["targets"]] * batch["loss_mask"]).sum()
            event[f"loss/{source}"] = float(nats / targets)
            event[f"bits_per_byte/{source}"] = float(nats / math.log(2) / size)
            total, count = total + nats, count + targets
        if count:
            event["loss"] = float(total / count)
        return event


def _pad_rows(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Fill up to `rows` with rows of padding, which count for nothing."""
    missing = rows - len(batch["tokens"])
    return {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in batch.items()}
