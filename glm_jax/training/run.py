"""A training run: resumes from the newest good checkpoint, under a config that may change. Read `Run.steps` first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import optax

from glm_jax.config import Experiment, interventions, recipe
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.rows import Rows
from glm_jax.engine.passes import Gradients
from glm_jax.errors import UserError, WorkFailed
from glm_jax.interop import initial
from glm_jax.model import GLMConfig
from glm_jax.parallel import devices, processes
from glm_jax.signals import deferred
from glm_jax.training import evaluation, precision
from glm_jax.training import state as states
from glm_jax.training.evaluation import Evaluator, heldout
from glm_jax.training.observers import Observer, Request, Step
from glm_jax.training.observers.spikes import Bands, Spike
from glm_jax.training.observers.standard import standard
from glm_jax.training.stopping import Stop
from glm_jax.training.stretch import Stretch, ready
from glm_jax.types import Json, Tree
from glm_jax.workdir import folder
from glm_jax.workdir.checkpoints import Checkpoints
from glm_jax.workdir.events import Event, versions
from glm_jax.workdir.interventions import Record
from glm_jax.workdir.monitor import Monitor, shown_evaluation

Say = Callable[[str], None]


class Run:
    """One process's part of a run.

    Attributes:
        config: as requested; `current` is the config in effect now, with interventions applied.
        step, samples: optimizer steps taken and rows seen.
        state: the TrainState after them.
        base: with LoRA, the model's params that `state` has adapters of; () otherwise.
        observers: called after each step, in this order; append your own.
        evaluators: functions of the run whose values make up an evaluation.
    """

    def __init__(
        self, config: Experiment, workdir: Path, say: Say, optimizer: optax.GradientTransformation | None = None,
        observers: Sequence[Callable[[Stretch], Observer]] = (),
    ) -> None:  # fmt: skip
        """Check everything, prepare the data, and restore the newest good checkpoint or make the first state.

        Args:
            config: resolved.
            workdir: created if it is missing; if it holds a checkpoint, the run resumes.
            say: called with one line of text at a time.
            optimizer: any optax transformation, to replace the experiment's AdamW. It receives the mean gradients,
                unclipped, and its updates are added to the params; the experiment's learning rate is not used.
            observers: make more observers, which are called before the one that saves.

        Raises:
            UserError: the config, the data, the mesh or the workdir do not fit; nothing was written to the workdir.
        """
        self.config, self.workdir, self._optimizer = config, workdir, optimizer
        self._say = say if processes.is_first() else lambda line: None
        self._say(devices.describe())
        self._initial = initial.begin(config, workdir, self._say)
        prepared = ready(config, workdir, self._say, self._initial.tokenizer)
        self.stretch = Stretch(config, prepared, optimizer)  # checks the rest, before anything is written
        self.stretch.describe(self._say)
        more = [make(self.stretch) for make in observers]
        self.closing = contextlib.ExitStack()  # runs when everything is written
        if processes.is_first():
            self.closing.enter_context(folder.lock(workdir))
        processes.wait_for_all()
        self.checkpoints = Checkpoints(workdir, config.train.keep, config.train.keep_every, self._say)
        profiled = config.train.profile if processes.is_first() else ()
        self.observers: list[Observer] = standard(workdir, profiled, more)
        self.evaluators: list[Evaluator] = [heldout]
        self.stopping, self._asked, self._stop, self._closed = False, Request.NOTHING, Stop(), False
        self.saved_at = time.monotonic()
        self._latest: Step | None = None
        self._previous: Mapping[str, Tree] | None = None  # the metrics of the previous step
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def steps(self) -> Iterator[Step]:
        """Take the remaining steps: call the observers after each, then yield it.

        A step that an observer undoes, by going back, is not yielded. The run saves at the end and after a request to
        stop. Leaving the loop early saves nothing; the next call continues from there. A dead run raises WorkFailed.
        Ctrl-C leaves the loop, too, once the step under way is taken and the observers have seen it; that step is not
        yielded. A second Ctrl-C does not wait: the run may have lost its state, load it again.
        """
        self._check_open()
        self.stopping = False
        if self.step >= self._until and self.saved != self.step:
            self._change()  # the last loop was left at this step, before it saved and made the change
        if self.step >= self.current.train.steps:
            self.say(f"{self.workdir} is finished: step {self.step} of {self.current.train.steps}")
            return
        self.log({"event": "start", "step": self.step, "versions": versions(), **devices.facts()})
        self.stretch.meter.restart()
        try:
            if self.step == 0 and self.current.train.heldout_every():
                self.stretch.compile_ahead(self.state, recipe.batch_rows(self.current, self.samples), self.base)
                self.evaluate()
            while not self.stopping and not (self._stop.asked and processes.alone()):
                if self.step >= self._until:
                    self._change()
                if self.step >= self._until:  # it was the last step, or a request to stop interrupted the change
                    break
                if self._skip():
                    continue
                with deferred():  # or Ctrl-C in a notebook could lose the state, or an observer the step
                    step = self._take()
                    for observer in self.observers:
                        observer.after(step)
                        if self.step != step.number:  # it went back
                            break
                if self.step == step.number:
                    yield step
            self.save()
        finally:
            self._asked, self._stop, self._previous = Request.NOTHING, Stop(), None
            for observer in self.observers:
                observer.close()

    @property
    def current(self) -> Experiment:
        """The experiment in effect, with interventions applied."""
        return self.stretch.config

    @property
    def prepared(self) -> Prepared:
        """The data that batches are made of."""
        return self.stretch.prepared

    @property
    def watches_spikes(self) -> bool:
        """Whether the run waits for each step and watches it for spikes, even after the last rollback is used up."""
        return max(self.current.train.spike.rollbacks, self.config.train.spike.rollbacks) > 0

    def _take(self) -> Step:
        """Take one step. It may still be computing on return, so that the devices need not wait for the host."""
        number, rows = self.step + 1, recipe.batch_rows(self.current, self.samples)
        settings = recipe.describe(self.current, number, self.samples)
        with self.stretch.meter.waiting():
            batch = self.stretch.batch(self.samples, rows)
        for observer in self.observers:
            observer.before(self)
        asked = Request.STOP if self._stop.asked else self._asked
        self.state, metrics = self.stretch.train(self.state, batch, rows, settings, asked, self.base)
        self.step, self.samples = number, self.samples + rows
        # Run at most one step ahead, so that a request is met soon; where steps are watched, wait for each.
        settled, self._previous = (metrics if self.watches_spikes else self._previous), metrics
        jax.block_until_ready(settled)
        self.stretch.meter.count(rows, metrics["tokens"])
        request = Request(int(settled["requests"])) if settled else Request.NOTHING
        self.stopping = request == Request.STOP
        if request == Request.SAVE and settled is not metrics and self.saved == number - 1:
            request = Request.NOTHING  # met by the save of the step that carried it
        self._latest = Step(self, number, self.samples, metrics, settings, request)
        return self._latest

    def _skip(self) -> bool:
        """Skip the coming steps that train.skip_steps names, with their data; return whether there were any."""
        step, samples = recipe.skip(self.current, self.step, self.samples)
        if step == self.step:
            return False
        self.say(f"skipping steps {self.step + 1} to {step} with their data")
        self.monitor.progress(step - self.step)
        self.state = states.at_step(self.stretch.mesh, self.state, step, samples)
        self.step, self.samples = step, samples
        for observer in self.observers:
            observer.skipped(self)
        return True

    def ask(self, request: Request) -> None:
        """Send a request to all processes; it is met one or two steps later."""
        self._asked = max(self._asked, request)

    def fail(self, reason: str) -> NoReturn:
        """End a dead run: raise WorkFailed, in all processes alike. This step is not saved."""
        newest = self.checkpoints.written_step()
        kept = "nothing is saved" if newest is None else f"the newest checkpoint is that of step {newest}"
        raise WorkFailed(f"{reason}: lower optimizer.peak_lr, or skip data with train.skip_steps; {kept}")

    def stop(self) -> None:
        """Ask `steps` to end with a checkpoint. A signal handler may call this between any two lines.

        While data is prepared in the middle of a run, for a change of it, this raises KeyboardInterrupt.
        """
        self._stop.ask()

    def evaluate(self) -> Json:
        """Run the evaluators now, log the result and return it as an event."""
        self._check_open()
        event = evaluation.event(self)
        self.log(event)
        self.say(shown_evaluation(event))
        self.stretch.meter.restart()
        return event

    def save(self) -> None:
        """Save this step, unless it is saved; it is written while training continues. WorkFailed: it is not finite."""
        self._check_open()
        if self.saved == self.step:
            return
        if self._latest is not None and self._latest.number == self.step and not self._latest.is_healthy():
            self.fail(f"the loss or the update of step {self.step} is not finite")
        run = {
            "step": self.step,
            "samples": self.samples,
            "bands": self.bands.to_json(),
            "numbers": interventions.numbers(self.current),
            "sources": self.prepared.digests,
            **folder.identity(self.config, self.prepared.tokenizer),
            **({"base": self._initial.found} if self.stretch.cfg.lora else {}),
        }
        self.checkpoints.save(states.to_disk(self.stretch.cfg, self.stretch.mesh, self.state), run)
        self.saved, self.saved_at = self.step, time.monotonic()
        self._asked = Request.NOTHING  # the request is met
        self.stretch.meter.restart()

    def log(self, event: Event) -> None:
        """Write an event to metrics.jsonl and the other sinks."""
        self.monitor.log(event)

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        (self.monitor.say if "monitor" in self.__dict__ else self._say)(line)

    @functools.cached_property
    def monitor(self) -> Monitor:
        """The sinks of events and the progress bar, made when first used."""
        first, project = processes.is_first(), self.config.train.wandb
        return Monitor(self.workdir, self.current.train.steps, self.step, primary=first, wandb_project=project)

    def _begin(self) -> None:
        """Restore the newest good checkpoint, or make the first state."""
        run = self._restore()
        self.record = Record(self.workdir, self.step, primary=processes.is_first())
        if processes.is_first():  # only now, when nothing in the workdir can be refused any more
            folder.write(self.workdir, self.config, self.prepared.tokenizer)
        if run is None:
            self._say(f"model: {self.model.num_parameters:,} parameters, mesh {dict(self.stretch.mesh.shape)}")
            if self.stretch.cfg.lora:
                self._say(states.describe_parts(self.state, self.base))
        else:
            self._say(f"resuming from step {self.step}, sample {self.samples:,}")
            kept, now = run["sources"], self.prepared.digests
            for name in [name for name in now if kept.get(name, now[name]) != now[name]]:
                self._say(f"the text of {name} has changed: rows from here on are drawn from the new text")
        self._enter(run)

    def _restore(self, at_most: int | None = None) -> Json | None:
        """Restore the newest good checkpoint and return its `run`; if there is none, make the first state."""
        cfg, mesh, self._previous = self.stretch.cfg, self.stretch.mesh, None
        targets = states.disk_targets(cfg, mesh)
        restored = self.checkpoints.restore(targets, at_most, lambda: vars(self).pop("state", None))
        if "base" not in self.__dict__:
            if restored and cfg.lora:
                self._initial = self._initial.again(restored.run["base"])
            self.base = states.create_base(cfg, mesh, self._initial.load)
        if restored is None:
            self.step, self.samples, self.bands, self.saved = 0, 0, Bands(), None
            self.state = states.create_state(cfg, mesh, self._initial.load)
            return None
        run = restored.run
        self.state = states.from_disk(cfg, mesh, restored.items)
        self.step, self.samples, self.bands = run["step"], run["samples"], Bands.from_json(run["bands"])
        self.saved = self.step
        return run

    def _enter(self, run: Json | None) -> None:
        """Put the config of the next step into effect, and record what differs from the checkpoint of `run`."""
        skipped, before = self.record.skipped(), run and run["numbers"]
        config = interventions.effective(self.config, self.step, skipped)
        try:
            same = config.data == self.current.data
            with self._stop.interrupting(processes.alone() and not same):
                prepared = self.prepared if same else ready(config, self.workdir, self._say, self._initial.tokenizer)
        except KeyboardInterrupt:
            if not self._stop.asked:
                raise
            self._until = self.step  # the run stops here; when it continues, the change is due
            return
        scaling = config.train.scaling()
        if before is None:  # a new state, made for the stretch
            rescaled = scaling != self.stretch.cfg.loss_scale
            self._initial.note(self.record)
        else:
            rescaled = before["train.precision"] != config.train.precision
            for cause, changes in interventions.causes(self.config, self.step, before, config, skipped):
                self.record.add(self.step, self.samples, cause, changes)
                shown = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())
                self.say(f"from step {self.step} on ({cause}): {shown}")
        if rescaled:
            scale = precision.initial_loss_scale(scaling)
            self.state = states.at_step(self.stretch.mesh, self.state, self.step, self.samples, scale)
        if config != self.current:
            self.stretch.close()
            self.stretch = Stretch(config, prepared, self._optimizer)
        self._until = interventions.next_step(self.config, self.step, self.current.train.steps)

    def _change(self) -> None:
        """Make the change planned after this step. If it fails, because of its data say, no step is lost."""
        if self.step >= self.current.train.steps and self.saved != self.step:
            self.save()  # under the config that led here, as for every checkpoint
        try:
            self._enter({"numbers": interventions.numbers(self.current)})
        except (UserError, KeyboardInterrupt):
            if processes.alone() and self.saved != self.step:
                self.save()
            raise
        self.stretch.meter.restart()

    def restore(self, at_most: int | None = None) -> None:
        """Go back to the newest good checkpoint, of step `at_most` at the latest; newer ones are set aside."""
        self._check_open()
        run = self._restore(at_most)
        self.record.forget(self.step)
        if "monitor" in self.__dict__:
            self.monitor.rewind(self.step)
        self._enter(run)

    def go_back(self, seen: Spike) -> None:
        """Restore the last good checkpoint before a spike, and skip the data from there through the spike."""
        run = self._restore(seen.step - 1)
        self.record.forget(self.step)
        skipped, known = (self.step + 1, seen.step), self.record.skipped()
        old, new = (
            interventions.numbers(interventions.effective(self.config, self.step, pairs))
            for pairs in (known, [*known, skipped])
        )
        change = interventions.changes(old, new)
        self.record.add(self.step, self.samples, "spike", change, skipped=skipped, seen=dataclasses.asdict(seen))
        self.monitor.rewind(self.step)
        self.say(
            f"spike at step {seen.step}: {seen.reason}; going back to step {self.step} and skipping the data up to "
            f"the spike ({len(known) + 1} of {self.config.train.spike.rollbacks} times)"
        )
        self._enter(run)

    @property
    def model(self) -> GLMConfig:
        """The model config that `glm_jax.model.apply` takes."""
        return self.stretch.cfg.engine.model

    @property
    def params(self) -> Tree:
        """The float32 params on the mesh, in the shape that `glm_jax.model.apply` takes."""
        return states.whole_params(self.stretch.cfg, self.state.params, self.base)

    def rows(self, first: int | None = None, count: int | None = None) -> Rows[np.ndarray]:
        """Return `count` rows of the training data, starting at row `first`; by default the rows of the next step."""
        start = self.samples if first is None else first
        return self.stretch.batches.at(start, recipe.batch_rows(self.current, start) if count is None else count)

    def gradients(self, rows: Rows[np.ndarray]) -> Gradients:
        """Return loss sums and the gradients of the mean loss over rows [B, ...], B whole microbatches; no dropout."""
        return self.stretch.gradients(states.model_params(self.stretch.cfg, self.state.params, self.base), rows)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until checkpoints are written, close the log and unlock the workdir. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.closing:
            self.stretch.close()
            self.checkpoints.close()
            if monitor := self.__dict__.pop("monitor", None):  # later lines have no bar to print above
                for event in self.checkpoints.events():
                    monitor.log(event)
                monitor.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the run is closed: load it again")
