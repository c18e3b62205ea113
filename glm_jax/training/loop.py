"""The run: prepare, step, log, evaluate, save, change in mid-run, go back after a spike, stop on request."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from glm_jax.config import Experiment
from glm_jax.data.corpora.corpus import Shards
from glm_jax.data.corpora.prepare import Prepared, prepare
from glm_jax.engine import build
from glm_jax.errors import UserError
from glm_jax.parallel import processes
from glm_jax.training import interventions, precision, recipe, segment, spike
from glm_jax.training.monitor import Meter, Monitor, peak_flops, summary
from glm_jax.training.profile import Profiler
from glm_jax.training.segment import Segment, loss_metrics
from glm_jax.training.spike import Bands
from glm_jax.training.state import TrainState, at_step, create_state, disk_targets, from_disk, to_disk
from glm_jax.workdir import folder as workdirs
from glm_jax.workdir.checkpoints import Checkpoints, Restored
from glm_jax.workdir.events import import_wandb
from glm_jax.workdir.interventions import Record

DONE, STOPPED = 0, 3  # exit codes
GO_ON, SAVE, STOP = 0, 1, 2  # what a process may ask of all; the largest request holds

Say = Callable[[str], None]


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


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    state: TrainState
    step: int = 0
    samples: int = 0
    bands: Bands = Bands()
    stopping: bool = False
    saved: int | None = None  # the step of the last checkpoint asked for
    spiked: int | None = None  # the step of the last spike that was not gone back from


class Run:
    """One process's part of a run, from the newest good checkpoint (or the start) to the last step."""

    def __init__(self, config: Experiment, workdir: Path, say: Say) -> None:
        """Check everything and prepare the data.

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
        if config.train.wandb:
            import_wandb()  # one that is missing should be said now
        for step, _ in config.interventions:
            build(interventions.effective(config, step))  # one that does not fit should be said now
        self.config, self.workdir = config, workdir
        self.say = say if processes.is_first() else lambda line: None
        self._lock = contextlib.ExitStack()
        self.prepared = segment.ready(config, workdir, self._prepare)
        self._first = Segment(config, self.prepared)  # checks the rest, before anything is written
        if processes.is_first():
            self._lock.enter_context(workdirs.lock(workdir))
            workdirs.write(workdir, config, self.prepared.tokenizer)
        processes.wait_for_all()
        self.checkpoints = Checkpoints(workdir, config.train.keep, config.train.keep_every, self.say)
        self.stop = StopRequest()
        self._last_save = time.monotonic()

    def _prepare(self, config: Experiment) -> Prepared:
        """Prepare data: the first process alone, then the others, which find most of it in the cache."""
        if not processes.is_first():
            processes.wait_for_all()
        prepared = prepare(config, self.say)
        if processes.is_first():
            processes.wait_for_all()
        return prepared

    def heldout(self) -> dict[str, Shards]:
        """Return the held-out documents of each source."""
        return {source: splits["heldout"] for source, splits in self.prepared.shards.items()}

    def go(self) -> int:
        """Train to the last step, or until asked to stop. Returns the exit code."""
        with self._lock, self.stop.listening():
            return self._go()

    def _go(self) -> int:
        try:
            progress, part = self._start()
            last = part.config.train.steps
            if progress.step >= last:
                self.say(f"{self.workdir} is finished: step {progress.step} of {last}")
                return DONE
            self.monitor = Monitor(
                self.workdir, last, progress.step, primary=processes.is_first(), wandb_project=self.config.train.wandb
            )
            self.monitor.log({"event": "start", "step": progress.step, "versions": versions()})
            self.profiler = Profiler(self.workdir, self.config.train.profile if processes.is_first() else ())
            try:
                last = self._segments(progress, part)
            finally:
                self.profiler.close()
                self.checkpoints.close()
                for event in self.checkpoints.events():
                    self.monitor.log(event)
                self.monitor.close()
        finally:
            self.checkpoints.close()
        if unsaved := self.checkpoints.unsaved():
            raise UserError(f"step {progress.step} could not be saved ({unsaved}): make room, then the same command "
                            "goes on from the newest checkpoint")  # fmt: skip
        if progress.step < last:
            self.say(f"stopped: step {progress.step} is saved in {self.workdir}; the same command goes on from there")
            return STOPPED
        return DONE

    def _start(self) -> tuple[Progress, Segment]:
        """Return the state of the newest good checkpoint, or a new one, and what it goes on with."""
        part = self._first
        restored = self.checkpoints.restore(disk_targets(part.cfg, part.mesh))
        if restored is None:
            self.record = Record(self.workdir, 0, primary=processes.is_first())
            self.say(f"model: {part.cfg.engine.model.num_parameters:,} parameters, mesh {dict(part.mesh.shape)}")
            progress, before = Progress(create_state(part.cfg, part.mesh)), None
        else:
            progress, before = self._restored(part, restored), restored.run["numbers"]
            self.record = Record(self.workdir, progress.step, primary=processes.is_first())
            self.say(f"going on from step {progress.step}, sample {progress.samples:,}")
            kept = restored.run["sources"]
            for name in [name for name, digest in self.prepared.digests.items() if kept.get(name, digest) != digest]:
                self.say(f"the text of {name} is not what it was: rows from here on are drawn from what it is now")
        return progress, self._next_segment(progress, part, before)

    def _restored(self, part: Segment, restored: Restored) -> Progress:
        run = restored.run
        bands = Bands.from_json(run["bands"])
        return Progress(
            from_disk(part.cfg, part.mesh, restored.items), run["step"], run["samples"], bands, saved=run["step"]
        )

    def _next_segment(self, progress: Progress, part: Segment, before: Mapping[str, Any] | None) -> Segment:
        """Return what holds after `progress`, and write down what has changed against the numbers `before`."""
        step, skipped = progress.step, self.record.skipped()
        config = interventions.effective(self.config, step, skipped)
        now = interventions.numbers(config)
        if before is not None:
            before = interventions.after_spikes(before, skipped)  # their own lines say so
            due = {key for at, values in self.config.interventions if at <= step for key in values}
            changes = interventions.changes(before, now)
            for cause, own in (("planned", due), ("config", changes.keys() - due)):
                if mine := {key: pair for key, pair in changes.items() if key in own}:
                    self.record.add(step, progress.samples, cause, mine)
                    shown = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in mine.items())
                    self.say(f"from step {step} on ({cause}): {shown}")
        scaling = config.train.scaling()
        if before is None:  # a new state, made for `part`
            rescaled = scaling != part.cfg.loss_scale
        else:
            rescaled = before["train.precision"] != now["train.precision"]
        if rescaled:
            scale = precision.initial_loss_scale(scaling)
            progress.state = at_step(part.mesh, progress.state, step, progress.samples, scale)
        if config == part.config:
            return part
        part.close()
        same = config.data == part.config.data
        return Segment(config, part.prepared if same else segment.ready(config, self.workdir, self._prepare))

    def _segments(self, progress: Progress, part: Segment) -> int:
        """Go on until the last step or a request to stop, and save; returns the run's last step."""
        if progress.step == 0 and part.config.train.eval_every:
            self._evaluate(progress, part)
        while progress.step < part.config.train.steps and not progress.stopping:
            last = part.config.train.steps
            back = self._steps(progress, part, interventions.next_step(self.config, progress.step, last))
            if back:
                part = self._go_back(progress, part, back)
            elif not progress.stopping:
                if progress.step >= last and progress.saved != progress.step:
                    self._save(progress, part)  # with the config that it was reached with, as all are
                part = self._changed(progress, part)
        if progress.saved != progress.step:
            self._save(progress, part)
        part.close()
        return part.config.train.steps

    def _changed(self, progress: Progress, part: Segment) -> Segment:
        """Return what an intervention makes of `part`; one that does not fit, for its data say, costs no steps."""
        try:
            return self._next_segment(progress, part, interventions.numbers(part.config))
        except UserError:
            if processes.alone() and progress.saved != progress.step:
                self._save(progress, part)
            raise

    def _steps(self, progress: Progress, part: Segment, until: int) -> dict[str, Any] | None:
        """Take steps up to `until`, or a stop; returns what was seen of a spike that is to be gone back from."""
        config = part.config
        meter = Meter(part.cfg.engine, config.data.seq_length, peak_flops(part.mesh))
        rollbacks, previous = config.train.spike.rollbacks, None
        watching = rollbacks > 0 or self.config.train.spike.rollbacks > 0  # also when they are used up
        while progress.step < until and not progress.stopping:
            if self._pass_over(progress, part):
                continue
            rows = recipe.batch_rows(config, progress.samples)
            chosen = recipe.describe(config, progress.step + 1, progress.samples)
            with meter.waiting():
                batch = part.batch(progress.samples, rows)
            self.profiler.before(progress.step + 1)
            progress.state, metrics = part.train(progress.state, batch, rows, chosen, self._request(config))
            self.profiler.after(progress.step + 1, metrics)
            progress.step, progress.samples = progress.step + 1, progress.samples + rows
            # At most one step ahead, so that a request is met at once; not at all where each step is watched.
            settled, previous = (metrics if watching else previous), metrics
            jax.block_until_ready(settled)
            meter.count(rows, metrics["tokens"])
            if watching and (seen := self._spike(progress, config, metrics)):
                if rollbacks:
                    return seen
                self._bear(progress, seen)
            request = int(settled["requests"]) if settled else GO_ON
            progress.stopping = request == STOP
            self._report(progress, part, metrics, chosen, meter)
            if progress.step % config.train.save_every == 0 or request == SAVE:
                self._save(progress, part)
                meter.restart()
                previous = None  # what it asked for is done
        return None

    def _request(self, config: Experiment) -> int:
        """Return what this process asks of all; the clock is the first one's."""
        if self.stop.requested:
            return STOP
        minutes, passed = config.train.save_minutes, time.monotonic() - self._last_save
        return SAVE if minutes and processes.is_first() and passed > 60 * minutes else GO_ON

    def _pass_over(self, progress: Progress, part: Segment) -> bool:
        """Pass over the steps that are to be skipped next; False when there are none."""
        step, samples = recipe.pass_over(part.config, progress.step, progress.samples)
        if step == progress.step:
            return False
        self.monitor.say(f"steps {progress.step + 1} to {step} are passed over with their data")
        self.monitor.progress(step - progress.step)
        progress.state = at_step(part.mesh, progress.state, step, samples)
        progress.step, progress.samples = step, samples
        if step == part.config.train.steps and part.config.train.eval_every:
            self._evaluate(progress, part)  # at the end, as of every run
        return True

    def _spike(self, progress: Progress, config: Experiment, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        loss, norm = loss_metrics(metrics["sums"])["loss"], float(metrics["grad_norm"])
        progress.bands, reason = spike.watch(config, progress.bands, loss, norm)
        seen = {"step": progress.step, "loss": loss, "grad_norm": norm, "reason": reason}
        return None if reason is None else seen

    def _bear(self, progress: Progress, seen: dict[str, Any]) -> None:
        """Tell of a spike after which the run goes on, as it has gone back often enough; once for steps in a row."""
        if progress.spiked != seen["step"] - 1:
            self.monitor.log({"event": "spike", **seen})
            self.monitor.say(
                f"spike at step {seen['step']}: {seen['reason']}; going on, train.spike.rollbacks are used up"
            )
        progress.spiked = seen["step"]

    def _go_back(self, progress: Progress, part: Segment, seen: dict[str, Any]) -> Segment:
        """Restore the last good checkpoint before a spike and pass over the data from there to it."""
        del progress.state  # makes room for the one that takes its place
        restored = self.checkpoints.restore(disk_targets(part.cfg, part.mesh), at_most=seen["step"] - 1)
        back = self._restored(part, restored) if restored else Progress(create_state(part.cfg, part.mesh))
        self.record.forget(back.step)
        skipped, known = (back.step + 1, seen["step"]), self.record.skipped()
        before, after = (
            interventions.numbers(interventions.effective(self.config, back.step, pairs))
            for pairs in (known, [*known, skipped])
        )
        change = interventions.changes(before, after)
        self.record.add(back.step, back.samples, "spike", change, skipped=skipped, seen=seen)
        self.monitor.rewind(back.step)
        self.monitor.say(
            f"spike at step {seen['step']}: {seen['reason']}; going back to step {back.step}, the data up to the spike "
            f"is passed over ({len(known) + 1} of {self.config.train.spike.rollbacks} times)"
        )
        progress.state, progress.step, progress.samples = back.state, back.step, back.samples
        progress.bands, progress.saved = back.bands, back.saved
        return self._next_segment(progress, part, restored and restored.run["numbers"])

    def _report(
        self, progress: Progress, part: Segment, metrics: Mapping[str, Any], chosen: Mapping[str, float], meter: Meter
    ) -> None:
        """Log and evaluate after a step where it is due, and say what became of earlier checkpoints."""
        train, step = part.config.train, progress.step
        last, shown = step == train.steps, None
        if step % train.log_every == 0 or last:
            event = train_event(progress, metrics, chosen) | meter.read()
            self.monitor.log(event)
            shown = summary(event)
        self.monitor.progress(1, shown)
        # Evaluated before it is saved: a checkpoint's step has its evaluation in the record.
        if train.eval_every and (step % train.eval_every == 0 or last):
            self._evaluate(progress, part)
            meter.restart()
        for event in self.checkpoints.events():
            self.monitor.log(event)

    def _evaluate(self, progress: Progress, part: Segment) -> None:
        event = part.evaluate(progress.state, progress.step)
        self.monitor.log(event)
        shown = [f"{name} {value:.4f}" for name, value in event.items() if name not in ("event", "step")]
        self.monitor.say(f"held-out at step {progress.step}: " + ", ".join(shown))

    def _save(self, progress: Progress, part: Segment) -> None:
        run = {
            "step": progress.step,
            "samples": progress.samples,
            "bands": progress.bands.to_json(),
            "numbers": interventions.numbers(part.config),
            "sources": part.prepared.digests,
            "versions": versions(),
        }
        self.checkpoints.save(to_disk(part.cfg, part.mesh, progress.state), run)
        progress.saved, self._last_save = progress.step, time.monotonic()


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers and files depend on."""
    return {name: importlib.metadata.version(name) for name in ("glm-jax", "jax", "orbax-checkpoint")}


def train_event(progress: Progress, metrics: Mapping[str, Any], chosen: Mapping[str, float]) -> dict[str, Any]:
    """Return the event of the step that `progress` has just taken."""
    values = {name: float(value) for name, value in metrics.items() if getattr(value, "ndim", None) == 0}
    del values["requests"]
    whole = {name: int(values[name]) for name in ("tokens", "skipped")}
    return {
        "event": "train",
        "step": progress.step,
        "samples": progress.samples,
        **loss_metrics(metrics["sums"]),
        **values,
        **whole,
        "embedding_shrink": chosen["embedding_shrink"],
        "batch": chosen["batch"],
        "activation_rms": [float(value) for value in metrics["activation_rms"]],
    }
