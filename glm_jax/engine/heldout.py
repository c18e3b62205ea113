"""The held-out loss of a model on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from glm_jax.config import Experiment
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.experiment import heldout_answers, heldout_batches
from glm_jax.data.rows.rows import Rows
from glm_jax.parallel.mesh import local_rows, place
from glm_jax.types import Tree


class HeldOut:
    """The held-out loss of every source and every set of instructions, always over the same rows and blanks."""

    def __init__(self, config: Experiment, prepared: Prepared, mesh: jax.sharding.Mesh) -> None:
        self._mesh = mesh
        self._rows = config.train.global_batch // config.train.microbatches
        self._limit = config.train.eval_rows
        self._batches = heldout_batches(config, prepared) | heldout_answers(config, prepared)
        self._total = set(prepared.shards) or set(prepared.instruction_weights)  # the names that `loss` sums over
        self._token_bytes = prepared.tokenizer.token_bytes

    def losses(
        self, evaluate: Callable[[Tree, Rows[jax.Array]], jax.Array | np.ndarray], params: Tree
    ) -> dict[str, float]:
        """Return `loss` over all sources and `loss/<name>`, in nats a target token, and `bits_per_byte/<name>`.

        A name is a source's or a set's. Without any source, `loss` is over all sets that are trained on.

        Args:
            evaluate: returns the loss of every target token, [1, B, S], for params and rows [1, B, ...].
            params: for `evaluate`.
        """
        found: dict[str, float] = {}
        total, count = 0.0, 0.0
        mine = local_rows(self._mesh, self._rows, 1).reshape(-1)
        for source, batches in self._batches.items():
            nats, targets, size = 0.0, 0.0, 0.0
            rows = min(self._limit, max(batches.rows_per_epoch, 1))  # a short text makes one row, partly empty
            for first in range(0, rows, self._rows):
                batch = batches.at(first, min(self._rows, rows - first)).pad(self._rows)
                placed = place(self._mesh, batch.take(mine), 1)
                losses = np.asarray(evaluate(params, placed)[0], np.float64)  # [B, S]
                nats += losses.sum()
                targets += batch.loss_mask.sum()
                size += (self._token_bytes[batch.targets] * batch.loss_mask).sum()
            found[f"loss/{source}"] = float(nats / targets)
            found[f"bits_per_byte/{source}"] = float(nats / math.log(2) / size)
            if source in self._total:
                total, count = total + nats, count + targets
        if count:
            found["loss"] = float(total / count)
        return found
