"""The run: prepare, step, log, evaluate, save, stop on request."""

from __future__ import annotations

import contextlib
import importlib.metadata
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from glm_jax.config import Config
from glm_jax.data.blanks import OBJECTIVES
from glm_jax.data.corpus import Shards
from glm_jax.data.prepare import Prepared, prepare
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh as meshes
from glm_jax.training import engine
from glm_jax.training import workdir as workdirs
from glm_jax.training.checkpoint import Checkpoints
from glm_jax.training.engine import EngineConfig, Sums
from glm_jax.training.evaluation import Evaluation, training_batches
from glm_jax.training.monitor import Meter, Monitor, peak_flops
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.precision import Precision
from glm_jax.training.step import StepConfig, TrainState, compile_steps, create_state

DONE, STOPPED = 0, 3  # exit codes


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads between steps; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.requested = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen while the block runs."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def engine_config(config: Config, glm: GLMConfig, num_tokens: int) -> EngineConfig:
    """Give all that gradients depend on."""
    return EngineConfig(
        model=glm,
        num_tokens=num_tokens,
        objectives=len(OBJECTIVES),
        compute=config.train.precision,
        schedule=config.pipeline.schedule,
        keep=config.pipeline.stash,
        normalization=config.train.loss_normalization,
        zero=config.mesh.zero,
    )


def step_config(config: Config, glm: GLMConfig, num_tokens: int) -> StepConfig:
    """Give all that a step depends on; `num_tokens` are the real rows of the vocabulary."""
    return StepConfig(
        engine=engine_config(config, glm, num_tokens),
        optimizer=OptimizerConfig.from_config(config),
        precision=Precision.from_config(config),
        embedding_shrink=config.train.embedding_shrink,
        seed=config.seed,
    )


def build_mesh(config: Config) -> jax.sharding.Mesh:
    """Build the mesh and check that the model and the batch can be laid over it, before any data is read.

    Raises:
        UserError: too few devices, or a size that does not divide.
    """
    mesh = meshes.build({axis: config.mesh[axis] for axis in meshes.AXES})
    pieces = config.model.vocab_multiple  # what divides this divides the vocabulary, which is a multiple of it
    glm = GLMConfig.from_section(config.model.to_dict(), pieces, config.data.seq_length)
    train = config.train
    engine.check(
        engine_config(config, glm, pieces), mesh, train.global_batch, train.microbatches, config.data.seq_length
    )
    return mesh


def loss_metrics(sums: Sums) -> dict[str, float]:
    """Turn sums by objective into `loss` and `loss/<objective>`, nats a target token; absent objectives stay out."""
    losses, targets = np.asarray(sums.loss, np.float64), np.asarray(sums.targets, np.float64)
    metrics = {"loss": float(losses.sum() / max(targets.sum(), 1.0))}
    for name, loss, count in zip(OBJECTIVES, losses, targets, strict=True):
        if count:
            metrics[f"loss/{name}"] = float(loss / count)
    return metrics


class Loop:
    """One process's part of a run, from the newest checkpoint (or the start) to the last step."""

    def __init__(self, config: Config, workdir: Path, prepared: Prepared) -> None:
        self.config, self.workdir, self.prepared = config, workdir, prepared
        glm = workdirs.model_config(config, prepared.tokenizer)
        self.cfg = step_config(config, glm, prepared.tokenizer.size)
        self.mesh = build_mesh(config)
        self.batches = training_batches(config, prepared)
        self.evaluation = Evaluation(config, prepared, self.mesh)
        self.train, self.evaluate = compile_steps(self.cfg, self.mesh)

    def run(self, say: Callable[[str], None]) -> int:
        """Train to the last step, or until asked to stop. Returns the exit code."""
        checkpoints = Checkpoints(self.workdir, self.config.train.keep)
        try:
            state, step = self._start(checkpoints, say)
            if step >= self.config.train.steps:
                say(f"{self.workdir} is finished: step {step} of {self.config.train.steps}")
                return DONE
            with StopRequest().listening() as stop:
                monitor = Monitor(self.workdir, self.config.train.steps, step)
                try:
                    step = self._steps(state, step, checkpoints, monitor, stop)
                finally:
                    monitor.close()
        finally:
            checkpoints.close()
        if step < self.config.train.steps:
            say(f"stopped: step {step} is saved in {self.workdir}; the same command goes on from there")
            return STOPPED
        return DONE

    def heldout(self) -> dict[str, Shards]:
        """Give the held-out documents of each source."""
        return {source: splits["heldout"] for source, splits in self.prepared.shards.items()}

    def _start(self, checkpoints: Checkpoints, say: Callable[[str], None]) -> tuple[TrainState, int]:
        if checkpoints.latest_step() is None:
            state = create_state(self.cfg, self.mesh)
            say(f"model: {self.cfg.engine.model.num_parameters:,} parameters, mesh {dict(self.mesh.shape)}")
            return state, 0
        restored = checkpoints.restore(self.cfg, self.mesh)
        step = restored.run["step"]
        say(f"going on from step {step}, sample {restored.run['samples']:,}")
        return restored.state, step

    def _steps(
        self, state: TrainState, step: int, checkpoints: Checkpoints, monitor: Monitor, stop: StopRequest
    ) -> int:
        """Run steps from `step`; returns the step reached, which is saved."""
        train, rows = self.config.train, self.config.train.global_batch
        samples = int(state.samples)
        if step == 0 and train.eval_every:
            self._evaluate(state, 0, monitor)
        meter = Meter(self.cfg.engine, self.config.data.seq_length, peak_flops(self.mesh))
        mine = meshes.local_rows(self.mesh, rows, train.microbatches).reshape(-1)
        stream = self.batches.prefetched(samples, rows, mine)
        saved, previous = checkpoints.latest_step(), None
        while step < train.steps and not stop.requested:
            with meter.waiting():
                batch = next(stream)
            state, metrics = self.train(state, meshes.place(self.mesh, batch, train.microbatches))
            step, samples = step + 1, samples + rows
            jax.block_until_ready(previous)  # at most one step ahead, so that a request to stop is met at once
            previous = metrics
            meter.count(rows, int((batch["segments"] > 0).sum()))
            shown = None
            if step % train.log_every == 0 or step == train.steps:
                shown = self._log(metrics, step, samples, meter, monitor)
            monitor.progress(1, shown)
            # Evaluated before it is saved: a checkpoint's step has its evaluation in the record.
            if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
                self._evaluate(state, step, monitor)
                meter.restart()
            if step % train.save_every == 0:
                checkpoints.save(self.cfg, self.mesh, state, self._record(step, samples))
                saved = step
                meter.restart()
        if saved != step:
            checkpoints.save(self.cfg, self.mesh, state, self._record(step, samples))
        return step

    def _log(self, metrics: Mapping[str, Any], step: int, samples: int, meter: Meter, monitor: Monitor) -> dict:
        values = {name: float(value) for name, value in metrics.items() if name != "sums"}
        event = {
            "event": "train",
            "step": step,
            "samples": samples,
            **values,
            "tokens": int(values["tokens"]),
            "skipped": int(values["skipped"]),
            **loss_metrics(metrics["sums"]),
            **meter.read(),
        }
        monitor.log(event)
        shown = {name.removeprefix("loss/"): f"{event[name]:.3f}" for name in event if name.startswith("loss/")}
        return {**shown, "tokens/s": f"{event['tokens_per_second']:,.0f}", "mfu": f"{event['mfu']:.1%}"}

    def _evaluate(self, state: TrainState, step: int, monitor: Monitor) -> None:
        event = self.evaluation.run(self.evaluate, state.params, step)
        monitor.log(event)
        shown = [f"{name} {value:.4f}" for name, value in event.items() if name not in ("event", "step")]
        monitor.say(f"held-out at step {step}: " + ", ".join(shown))

    def _record(self, step: int, samples: int) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("glm-jax", "jax", "orbax-checkpoint")}
        return {"step": step, "samples": samples, "sources": self.prepared.digests, "versions": versions}


def ready(config: Config, workdir: Path, say: Callable[[str], None]) -> Loop:
    """Check everything, prepare the data, and give the run, ready to start or to go on.

    Args:
        config: resolved.
        workdir: made if need be; goes on if it holds a checkpoint.
        say: told one line at a time.

    Raises:
        UserError: anything about the config, the data, the mesh or the workdir that does not fit; nothing is
            written to the workdir then.
    """
    if not config.data.sources:
        raise UserError("data.sources is empty: name at least one corpus, as experiments/quickstart.py does")
    workdirs.check(workdir, config)
    build_mesh(config)  # a mesh that cannot be should be said before minutes of data preparation
    prepared = prepare(config, say)
    workdirs.check_tokenizer(workdir, prepared.tokenizer)
    loop = Loop(config, workdir, prepared)
    workdirs.write(workdir, config, prepared.tokenizer)
    return loop
