"""A stretch: the part of a run under one config, with its mesh, compiled step and batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax

from glm_jax.config import Experiment, interventions, recipe
from glm_jax.data.corpora.prepare import Prepared, prepare
from glm_jax.data.rows.experiment import training_batches
from glm_jax.data.rows.rows import Rows
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.engine import EngineConfig, build, passes, stash
from glm_jax.engine.heldout import HeldOut
from glm_jax.engine.meter import Meter
from glm_jax.engine.passes import Gradients
from glm_jax.errors import UserError
from glm_jax.model.groups import Groups
from glm_jax.parallel import processes
from glm_jax.parallel.devices import peak_flops
from glm_jax.parallel.mesh import local_rows, place
from glm_jax.training.state import StepConfig, TrainState
from glm_jax.training.step import Controls, compile_steps, controls
from glm_jax.types import Tree
from glm_jax.workdir import folder
from glm_jax.workdir.events import import_wandb

if TYPE_CHECKING:
    import grain

Train = Callable[[TrainState, Rows[jax.Array], Controls, Tree], tuple[TrainState, dict[str, Tree]]]
Evaluate = Callable[[Tree, Tree, Rows[jax.Array]], jax.Array]


def step_config(
    config: Experiment, engine: EngineConfig, optimizer: optax.GradientTransformation | None = None
) -> StepConfig:
    """Return everything a step depends on besides its arrays and the mesh; `optimizer` replaces AdamW."""
    return StepConfig(
        engine=engine,
        optimizer=optimizer or config.optimizer.constants(),
        loss_scale=config.train.scaling(),
        shrinks=recipe.shrinks(config),
        seed=config.params_seed,
        groups=Groups.of(config),
        lora=config.train.lora if config.train.lora.rank else None,
    )


_jitted = functools.lru_cache(maxsize=2)(compile_steps)  # a change of the learning rate, say, compiles nothing again
_gradients = jax.jit(passes.value_and_grad, static_argnums=(0, 1))


class Stretch:
    """Everything a run uses while its config stays the same."""

    def __init__(
        self, config: Experiment, prepared: Prepared, optimizer: optax.GradientTransformation | None = None
    ) -> None:
        self.config, self.prepared = config, prepared
        engine, self.mesh = build(config, prepared.tokenizer.size)
        self.cfg = step_config(config, engine, optimizer)
        self._heldout = HeldOut(config, prepared, self.mesh)
        self.batches = training_batches(config, prepared)
        self._step, evaluate = _jitted(self.cfg, self.mesh)
        self._train, self._evaluate = processes.compiled_together(self._step), processes.compiled_together(evaluate)
        self._microbatch = config.train.global_batch // config.train.microbatches  # rows
        self._stream: grain.DatasetIterator[Rows[np.ndarray]] | None = None
        self._stands = (-1, 0)  # the first row of the stream's next batch, and its rows
        self._compiling: Future[object] | None = None
        self.compiled = False

    def describe(self, say: Callable[[str], None]) -> None:
        """Say what was chosen for this config and these devices."""
        if self.config.pipeline.stash == "auto" and self.mesh.shape["pipeline"] == 1:
            say(stash.describe(self.cfg.engine, self.mesh, self._microbatch, self.config.data.seq_length))

    def batch(self, samples: int, rows: int) -> Rows[np.ndarray]:
        """Read this process's share of the batch of `rows` rows that begins at row `samples`."""
        if self._stream is None or self._stands != (samples, rows):
            self._stop_reading()
            mine = local_rows(self.mesh, rows, rows // self._microbatch).reshape(-1)
            self._stream = self.batches.prefetched(samples, rows, mine)
        self._stands = (samples + rows, rows)
        return next(self._stream)

    def train(
        self,
        state: TrainState,
        batch: Rows[np.ndarray],
        rows: int,
        chosen: Mapping[str, float],
        request: int,
        base: Tree = (),
    ) -> tuple[TrainState, dict[str, Tree]]:
        """Take a step with a batch of `rows` rows over all processes and the settings that recipe.py has `chosen`."""
        placed = place(self.mesh, batch, rows // self._microbatch)
        self._await_compiling()
        return self._train(state, placed, controls(self.mesh, chosen["lr"], chosen["embedding_shrink"], request), base)

    def compile_ahead(self, state: TrainState, rows: int, base: Tree = ()) -> None:
        """Compile the step of `rows` rows in a thread, which `train` waits for; several processes compile together."""
        if not processes.alone():
            return
        two_streams = self.cfg.engine.model.position == "learned_2d"
        empty = Rows.empty(rows, self.config.data.seq_length, pad=0, two_streams=two_streams)
        arguments = (state, place(self.mesh, empty, rows // self._microbatch), controls(self.mesh, 0.0, 0.0), base)
        thread = ThreadPoolExecutor(1, "compile")
        self._compiling = thread.submit(lambda: self._step.lower(*arguments).compile())
        thread.shutdown(wait=False)

    def _await_compiling(self) -> None:
        if self._compiling is not None:
            wait([self._compiling])  # an error comes again from the call
            self._compiling = None

    def heldout(self, params: Tree, base: Tree = ()) -> dict[str, float]:
        """Return the held-out losses of a state's params, and of the base if they are adapters."""
        return self._heldout.losses(lambda params, rows: self._evaluate(params, base, rows), params)

    def gradients(self, params: Tree, rows: Rows[np.ndarray]) -> Gradients:
        """Return the gradients of the mean loss over rows [B, ...], see `engine.passes.value_and_grad`."""
        count = len(rows.tokens)
        mine = rows.take(local_rows(self.mesh, count, count // self._microbatch).reshape(-1))
        return _gradients(self.cfg.engine, self.mesh, params, place(self.mesh, mine, count // self._microbatch))

    @functools.cached_property
    def meter(self) -> Meter:
        """The meter of the stretch's speed."""
        return Meter(self.cfg.engine, self.config.data.seq_length, peak_flops(self.mesh))

    def close(self) -> None:
        """Stop the threads that read and compile ahead."""
        self._await_compiling()
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._stands = (-1, 0)


def ready(
    config: Experiment, workdir: Path, say: Callable[[str], None], tokenizer: Tokenizer | None = None
) -> Prepared:
    """Check a config against its workdir and devices, and prepare its data.

    The first process prepares alone. The others follow and find most of the data in the cache.

    Args:
        config: resolved, with the interventions up to the current step.
        workdir: of the run; not written to.
        say: called with one line for each thing done.
        tokenizer: for the data; None to do as config.data.tokenizer says.

    Raises:
        UserError: the config, the data, the mesh or the workdir do not fit.
    """
    config.check_sources()
    planned = [config, *(interventions.effective(config, step) for step, _ in config.interventions)]
    if any(one.data.blanks.causal_context for one in planned):
        raise UserError(
            "data.blanks.causal_context is for members of a sweep, which nothing but their sweep reads: fills and "
            "evaluations see contexts in both directions; set it to False"
        )
    if config.train.wandb:
        import_wandb()  # report a missing package before the work begins
    folder.check(workdir, config)
    for one in planned:
        build(one)  # report a mesh that does not fit now, not after minutes of data preparation or at its step
    if not processes.is_first():
        processes.wait_for_all()
    prepared = prepare(config, say, tokenizer=tokenizer)
    if processes.is_first():
        processes.wait_for_all()
    folder.check_tokenizer(workdir, prepared.tokenizer)
    return prepared
