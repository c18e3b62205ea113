"""A stretch of a run under one config: the mesh, the compiled step and the batches that follow from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.config import Experiment
from glm_jax.config.data import OBJECTIVES
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import EngineConfig, Sums, build
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel import processes
from glm_jax.training import recipe
from glm_jax.training.evaluation import Evaluation, training_batches
from glm_jax.training.state import StepConfig, TrainState
from glm_jax.training.step import compile_steps, controls
from glm_jax.workdir import folder as workdirs


def step_config(config: Experiment, engine: EngineConfig) -> StepConfig:
    """Return all that a step depends on besides its arrays and the mesh."""
    return StepConfig(
        engine=engine,
        optimizer=config.optimizer.constants(),
        loss_scale=config.train.scaling(),
        shrinks=recipe.shrinks(config),
        seed=config.seed,
    )


def loss_metrics(sums: Sums) -> dict[str, float]:
    """Turn sums by objective into `loss` and `loss/<objective>`, nats a target token; absent objectives stay out."""
    losses, targets = np.asarray(sums.loss, np.float64), np.asarray(sums.targets, np.float64)
    metrics = {"loss": float(losses.sum() / max(targets.sum(), 1.0))}
    for name, loss, count in zip(OBJECTIVES, losses, targets, strict=True):
        if count:
            metrics[f"loss/{name}"] = float(loss / count)
    return metrics


@functools.lru_cache(maxsize=2)  # a change of the learning rate alone, say, need not compile anything again
def _compiled(cfg: StepConfig, mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    train, evaluate = compile_steps(cfg, mesh)
    return (train, evaluate) if jax.process_count() == 1 else (_together(train), _together(evaluate))


def _together(function: Any) -> Callable[..., Any]:
    """Compile before the first call with new shapes, and wait until all processes have: collectives wait less long."""
    seen = set()

    def call(*arguments: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        if shapes not in seen:
            function.lower(*arguments).compile()
            processes.wait_for_all()
            seen.add(shapes)
        return function(*arguments)

    return call


class Segment:
    """All that a run is done with while its config stays the same."""

    def __init__(self, config: Experiment, prepared: Prepared) -> None:
        self.config, self.prepared = config, prepared
        engine, self.mesh = build(config, prepared.tokenizer.size)
        self.cfg = step_config(config, engine)
        self.evaluation = Evaluation(config, prepared, self.mesh)
        self._batches = training_batches(config, prepared)
        self._train, self._evaluate = _compiled(self.cfg, self.mesh)
        self._microbatch = config.train.global_batch // config.train.microbatches  # rows
        self._stream: Any = None
        self._stands = (-1, 0)  # the first row of the stream's next batch, and its rows

    def batch(self, samples: int, rows: int) -> Rows[np.ndarray]:
        """Read this process's share of the batch of `rows` rows that begins at row `samples`."""
        if self._stands != (samples, rows):
            self.close()
            mine = meshes.local_rows(self.mesh, rows, rows // self._microbatch).reshape(-1)
            self._stream = self._batches.prefetched(samples, rows, mine)
        self._stands = (samples + rows, rows)
        return next(self._stream)

    def train(
        self, state: TrainState, batch: Rows[np.ndarray], rows: int, chosen: Mapping[str, float], request: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take a step with a batch of `rows` rows in all, and what recipe.py has `chosen`."""
        placed = meshes.place(self.mesh, batch, rows // self._microbatch)
        return self._train(state, placed, controls(self.mesh, chosen["lr"], chosen["embedding_shrink"], request))

    def evaluate(self, state: TrainState, step: int) -> dict[str, Any]:
        """Return the event of the held-out losses."""
        return self.evaluation.run(self._evaluate, state.params, step)

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._stands = (-1, 0)


def ready(config: Experiment, workdir: Path, prepare: Callable[[Experiment], Prepared]) -> Prepared:
    """Check a config against its workdir and devices, and prepare its data.

    Args:
        config: resolved, as it holds where the run stands.
        workdir: of the run; nothing is written to it.
        prepare: makes or finds the data.

    Raises:
        UserError: anything about the config, the data, the mesh or the workdir that does not fit.
    """
    workdirs.check(workdir, config)
    build(config)  # a mesh that cannot be should be said before minutes of data preparation
    prepared = prepare(config)
    workdirs.check_tokenizer(workdir, prepared.tokenizer)
    return prepared
