"""Changes during a run, planned or not: the operator's tools of GLM-130B's training log.

A run resumes under any config that keeps the frozen keys of its workdir. A difference in a key that its numbers depend
on is an intervention: it takes effect with the step after a checkpoint, and is recorded as a line of
`interventions.jsonl`. The config may list the same changes from the start, as `interventions`, so that a record can be
replayed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from glm_jax.config.experiment import Experiment, by_key, role, with_changes
from glm_jax.types import Json


def effective(config: Experiment, step: int, skipped: Iterable[tuple[int, int]] = ()) -> Experiment:
    """Return the config in effect after `step`: with all interventions up to it.

    Args:
        config: resolved.
        step: the last step taken.
        skipped: ranges of steps skipped because of spikes; each uses up one of train.spike.rollbacks.
    """
    changes: dict[str, object] = {}
    for at, values in sorted(config.interventions, key=lambda pair: pair[0]):
        if at <= step:
            changes |= values
    changed = with_changes(config, changes) if changes else config
    skipped, ranges = list(skipped), changed.train.skip_steps
    if not skipped:
        return changed
    return with_changes(changed, {
        "train.skip_steps": (*ranges, *(pair for pair in skipped if pair not in ranges)),
        "train.spike.rollbacks": max(0, changed.train.spike.rollbacks - len(skipped)),
    })  # fmt: skip


def next_step(config: Experiment, step: int, last: int) -> int:
    """Return the first step after `step` at which an intervention takes effect, or `last` if that comes first."""
    return min([at for at, _ in config.interventions if at > step] + [last])


def numbers(config: Experiment) -> Json:
    """Return the keys that a run's numbers depend on, with their values as JSON gives them back."""
    plain = json.loads(json.dumps(by_key(config)))
    return {key: value for key, value in plain.items() if role(key) != "operational"}


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return the differences between two results of `numbers`."""
    keys = sorted(key for key in before.keys() | after.keys() if role(key) != "operational")  # it may have become so
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def after_spikes(before: Json, skipped: Iterable[tuple[int, int]]) -> Json:
    """Return a result of `numbers` that includes spikes it did not know yet, as `effective` does."""
    known, left = before["train.skip_steps"], before["train.spike.rollbacks"]
    ranges = [list(pair) for pair in skipped if list(pair) not in known]
    return {
        **before,
        "train.skip_steps": [*known, *ranges],
        "train.spike.rollbacks": max(0, left - len(ranges)),
    }


def causes(
    config: Experiment, step: int, before: Mapping[str, object], now: Experiment, skipped: Iterable[tuple[int, int]]
) -> list[tuple[str, dict[str, tuple[object, object]]]]:
    """Return what differs from the numbers `before` by cause: `planned` in `config`, or a new `config`.

    What the rollbacks that skipped the steps `skipped` changed is left out: they have their own lines in the record.
    """
    due = {key for at, values in config.interventions if at <= step for key in values}
    filled: Json = {**numbers(Experiment()), **before}  # a key that an older version lacks had its default
    found = changes(after_spikes(filled, skipped), numbers(now))
    by_cause = [(cause, {key: pair for key, pair in found.items() if (key in due) == planned})
                for cause, planned in (("planned", True), ("config", False))]  # fmt: skip
    return [(cause, changed) for cause, changed in by_cause if changed]
