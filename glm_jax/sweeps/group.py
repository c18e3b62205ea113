"""Train members of a sweep together: one program takes a step of all of them.

The program is `training.step.train_step` under `jax.lax.map` over members: vmap within a block of members, one block
after another. A block is as large as fits the processor's cache. Tiny members fit in one block; members of some
millions of parameters run one by one, which is faster than streaming all of them through memory for every operation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import Experiment, recipe
from glm_jax.config.fields import to_dict
from glm_jax.data.corpora.prepare import Prepared, prepare
from glm_jax.data.rows.batches import Batches
from glm_jax.data.rows.experiment import training_batches
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import build, loss_metrics, passes
from glm_jax.engine.heldout import HeldOut
from glm_jax.sweeps import second_half
from glm_jax.sweeps.unfinished import Steps, Unfinished
from glm_jax.training import stretch
from glm_jax.training.state import StepConfig, TrainState, init_state
from glm_jax.training.step import Controls, train_step
from glm_jax.types import Tree

Array = jax.Array
Metrics = dict[str, Tree]  # of a step, by name; see `train_step`
GroupStep = Callable[[TrainState, Rows[np.ndarray], np.ndarray, np.ndarray], tuple[TrainState, Metrics]]

BY_LAYER = ("activation_rms", "attention_scores")  # metrics [members, L]
CACHED = 8 << 20  # bytes of a block's state and logits


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of training a member.

    Attributes:
        losses: of every step's batch, nats a target token [T].
        metrics: the other metrics of a train step by name, [n] each, at `steps`; NaN where one is missing. Of
            `activation_rms` and `attention_scores`, the largest of all layers; with train.log_attention_scores also
            each layer's, as `activation_rms/layer_00` and so on.
        steps: [n], from 1.
        heldout: held-out losses after the last step, as `glm-jax train` logs them, and those of second_half.py where
            members have different blanks; empty if not evaluated.
        uniform, unigram: nats a target token that guessing costs, see verdict.py.
        skipped: number of steps whose gradients were not finite.
    """

    losses: np.ndarray
    metrics: Mapping[str, np.ndarray]
    steps: np.ndarray
    heldout: Mapping[str, float]
    uniform: float
    unigram: float
    skipped: int


class Streams:
    """The batches of several members; members that read the same data share them."""

    def __init__(self, configs: Sequence[Experiment], prepared: Mapping[str, Prepared]) -> None:
        keys = [json.dumps([config.seed, to_dict(config.data)], sort_keys=True) for config in configs]
        unique = list(dict.fromkeys(keys))
        self.of_member = np.array([unique.index(key) for key in keys], np.int32)  # [members]
        self._batches: list[Batches] = []
        for key in unique:
            config = configs[keys.index(key)]
            self._batches.append(training_batches(config, prepared[data_key(config)]))
        train = configs[0].train
        self._rows, self._microbatches = train.global_batch, train.microbatches

    def at(self, step: int) -> Rows[np.ndarray]:
        """Return the batches of `step`, from 1: arrays [streams, M, B/M, ...]."""
        batches = [stream.at((step - 1) * self._rows, self._rows) for stream in self._batches]
        leading = (len(batches), self._microbatches, -1)
        return Rows(
            *(np.stack(arrays).reshape(*leading, *arrays[0].shape[1:]) for arrays in zip(*batches, strict=True))
        )


def data_key(config: Experiment) -> str:
    """Return all that the preparation of a config's data depends on, as text."""
    data = to_dict(config.data)
    # what a sample may fill decides which samples fit
    room = [data["seq_length"], data["blanks"]["instruction_segments"]] if data["instructions"] else []
    return json.dumps([data["sources"], data["tokenizer"], data["instructions"], data["near_duplicates"],
                       data["heldout"], data["cache"], *room], sort_keys=True)  # fmt: skip


def prepare_all(configs: Sequence[Experiment], say: Callable[[str], None]) -> dict[str, Prepared]:
    """Prepare the data of all configs, each distinct data once; keyed by `data_key`."""
    prepared: dict[str, Prepared] = {}
    for config in configs:
        key = data_key(config)
        if key not in prepared:
            prepared[key] = prepare(config, say)
    return prepared


def block_size(members: int, member_bytes: int) -> int:
    """Return the number of members in a block: the largest divisor of `members` that fits the cache, at least one."""
    fitting = max(1, CACHED // member_bytes)
    return max(size for size in range(1, members + 1) if members % size == 0 and size <= fitting)


def _member_bytes(cfg: StepConfig, config: Experiment) -> int:
    rows = config.train.global_batch // config.train.microbatches
    logits = rows * config.data.seq_length * cfg.engine.model.vocab_size
    return 4 * (3 * cfg.engine.model.num_parameters + logits)


def compile_group(cfg: StepConfig, mesh: jax.sharding.Mesh, streams: np.ndarray, block: int) -> GroupStep:
    """Compile the step of all members, which donates the memory of their state.

    Args:
        cfg, mesh: as in `train_step`; the seed of `cfg` is used only for dropout.
        streams: which of the batches each member reads, int32 [members].
        block: members under one vmap; divides their number.

    Returns:
        (states [members, ...], batches [streams, M, B/M, ...], learning rates [members], alphas [members]) -> the
        states and the metrics after the step, both [members, ...].
    """
    requests = jnp.zeros(mesh.size, jnp.int32)

    def one(
        state: TrainState, batches: Rows[Array], stream: Array, lr: Array, shrink: Array
    ) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(lambda array: array[stream], batches)
        return train_step(cfg, mesh, state, batch, Controls(lr, shrink, requests))

    def step(states: TrainState, batches: Rows[Array], lrs: Array, shrinks: Array) -> tuple[TrainState, Metrics]:
        taken = (states, jnp.asarray(streams), lrs, shrinks)

        def member(values: tuple[TrainState, Array, Array, Array]) -> tuple[TrainState, Metrics]:
            state, stream, lr, shrink = values
            return one(state, batches, stream, lr, shrink)

        return jax.lax.map(member, taken, batch_size=block if block > 1 else None)

    return jax.jit(step, donate_argnums=0)


def init_states(cfg: StepConfig, seeds: Sequence[int]) -> TrainState:
    """Return the initial state of each seed, as in a run of its own: arrays [members, ...]."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])  # [members]
    return jax.jit(jax.vmap(lambda key: init_state(cfg, key=key)))(keys)


def begin(configs: Sequence[Experiment], prepared: Mapping[str, Prepared]) -> tuple[GroupStep, TrainState, Streams]:
    """Return what trains members that share a program: their step (see `compile_group`), states and batches.

    Raises:
        UserError: a model or a batch does not fit.
    """
    cfg, mesh = _shared(configs, prepared)
    streams = Streams(configs, prepared)
    block = block_size(len(configs), _member_bytes(cfg, configs[0]))
    step = compile_group(cfg, mesh, streams.of_member, block)
    return step, init_states(cfg, [config.params_seed for config in configs]), streams


def _shared(configs: Sequence[Experiment], prepared: Mapping[str, Prepared]) -> tuple[StepConfig, jax.sharding.Mesh]:
    first = configs[0]
    if first.pipeline.stash == "auto":  # which counts the memory of one member
        first = dataclasses.replace(first, pipeline=dataclasses.replace(first.pipeline, stash="layer"))
    engine, mesh = build(first, prepared[data_key(first)].tokenizer.size)
    if engine.attention == "cudnn":  # under vmap it takes no mask that heads share
        engine = dataclasses.replace(engine, attention="reference")
    return stretch.step_config(first, engine), mesh


def train(
    configs: Sequence[Experiment],
    prepared: Mapping[str, Prepared],
    progress: Callable[[int], None],
    unfinished: Unfinished | None = None,
) -> list[Outcome]:
    """Train members that share a program to their last step.

    Args:
        configs: resolved, with equal `members.program`.
        prepared: by `data_key`.
        progress: called with the number of steps done, after each step.
        unfinished: where steps are kept from time to time, and found again.

    Raises:
        UserError: a model or a batch does not fit.
    """
    first = configs[0]
    step, states, streams = begin(configs, prepared)
    counts = np.zeros((streams.of_member.max() + 1, states.params["embedding"]["word"].shape[1]))  # [streams, V]
    taken: list[Metrics] = []

    def arguments(number: int) -> tuple[Rows[np.ndarray], np.ndarray, np.ndarray]:
        chosen = [recipe.describe(config, number, (number - 1) * first.train.global_batch) for config in configs]
        lrs, shrinks = (np.array([c[key] for c in chosen], np.float32) for key in ("lr", "embedding_shrink"))
        return streams.at(number), lrs, shrinks

    if unfinished and (kept := unfinished.load(states, lambda: jax.eval_shape(step, states, *arguments(1))[1])):
        states, taken, counts = kept
    done = len(taken)
    for number in range(1, done + 1):
        progress(number)
    for number in range(done + 1, first.train.steps + 1):
        batches, lrs, shrinks = arguments(number)
        for stream, targets in enumerate(batches.targets):
            np.add.at(counts[stream], targets, batches.loss_mask[stream])
        states, metrics = step(states, batches, lrs, shrinks)
        if number > done + 1:  # at most one step ahead of the device
            taken[-1] = jax.device_get(taken[-1])
            progress(number - 1)
        taken.append(metrics)
        if unfinished and unfinished.due():
            taken[-1] = jax.device_get(taken[-1])
            unfinished.save(Steps(states, taken, counts))
    if done < first.train.steps:
        taken[-1] = jax.device_get(taken[-1])
        progress(first.train.steps)
    heldout = _evaluate(configs, prepared, states)
    uniform = math.log(prepared[data_key(first)].tokenizer.size)
    return [
        _outcome(first, taken, member, heldout[member], uniform, _entropy(counts[stream]))
        for member, stream in enumerate(streams.of_member)
    ]


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / max(counts.sum(), 1.0)
    return float(-(shares * np.log(shares)).sum())


def _evaluate(
    configs: Sequence[Experiment], prepared: Mapping[str, Prepared], states: TrainState
) -> list[dict[str, float]]:
    """Return each member's held-out losses, as the last evaluation of `glm-jax train` does."""
    if not configs[0].train.eval_every:
        return [{} for _ in configs]
    cfg, mesh = _shared(configs, prepared)

    @jax.jit
    def losses(params: Tree, batch: Rows[Array], member: Array) -> Array:
        own = jax.tree.map(lambda array: array[member], params)
        return passes.losses(cfg.engine, mesh, own, batch)

    differ = len({json.dumps(to_dict(config.data.blanks), sort_keys=True) for config in configs}) > 1
    found = []
    for member, config in enumerate(configs):
        own = functools.partial(losses, member=np.int32(member))
        data = prepared[data_key(config)]
        losses_by_name = HeldOut(config, data, mesh).losses(own, states.params)
        if differ:
            losses_by_name |= second_half.evaluate(config, data, functools.partial(own, states.params))
        found.append(losses_by_name)
    return found


def _outcome(
    config: Experiment,
    taken: Sequence[Metrics],
    member: int,
    heldout: Mapping[str, float],
    uniform: float,
    unigram: float,
) -> Outcome:
    of_step = [loss_metrics(jax.tree.map(lambda array: array[member], step["sums"])) for step in taken]
    every = config.train.log_every
    steps = np.array([step for step in range(1, len(taken) + 1) if step % every == 0 or step in (1, len(taken))])
    names = [name for name, value in taken[0].items() if name != "requests" and getattr(value, "ndim", 0) == 1]
    metrics = {name: np.array([taken[step - 1][name][member] for step in steps]) for name in names}  # [n] each
    for name in (name for name in BY_LAYER if name in taken[0]):
        values = np.array([taken[step - 1][name][member] for step in steps])  # [n, L]
        metrics[name] = values.max(1)
        if config.train.log_attention_scores:
            metrics |= {f"{name}/layer_{layer:02d}": values[:, layer] for layer in range(values.shape[1])}
    for name in sorted({name for losses in of_step for name in losses} - {"loss"}):
        metrics[name] = np.array([of_step[step - 1].get(name, np.nan) for step in steps])  # [n]
    losses = np.array([losses["loss"] for losses in of_step])  # [T]
    return Outcome(losses, metrics, steps, heldout, uniform, unigram, int(taken[-1]["skipped"][member]))
