"""Members trained together, compared with the same members trained one by one by the loop of `glm-jax train`."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.cli.train import DONE, go
from glm_jax.config import Config
from glm_jax.sweeps import group as sweep_group
from glm_jax.sweeps import members as sweep_members
from glm_jax.sweeps.group import Outcome, block_size
from glm_jax.sweeps.unfinished import Steps, Unfinished
from glm_jax.training.run import Run
from tests.sweeps.sweep_cases import tiny, write_text

pytestmark = pytest.mark.slow


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_text(folder)
    return folder


def members(base: Config, axes: dict[str, Any]) -> list[Config]:
    (group,) = sweep_members.group(sweep_members.expand(base, sweep_members.read_axes(axes)))
    return [member.config for member in group.members]


def together(configs: list[Config]) -> list[Outcome]:
    return sweep_group.train(configs, sweep_group.prepare_all(configs, quiet), lambda step: None)


def alone(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Train by the loop, and return the events of metrics.jsonl."""
    assert go(Run(config, workdir, quiet)) == DONE
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def check_equal(outcome: Outcome, events: list[dict[str, Any]]) -> None:
    """Check the loss and norms of every step, and the last held-out losses."""
    steps = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in steps] == outcome.steps.tolist() == list(range(1, len(outcome.losses) + 1))
    # a run alone keeps what a member of a group computes again, which rounds differently
    np.testing.assert_allclose(outcome.losses, [event["loss"] for event in steps], rtol=1e-5)
    for name in ("grad_norm", "update_norm", "grad_norm/embedding", "lr", "loss_scale"):
        np.testing.assert_allclose(outcome.metrics[name], [event[name] for event in steps], rtol=1e-4, err_msg=name)
    for name in ("activation_rms", "attention_scores"):
        by_layer = [event[name] for event in steps if name in event]  # [n, L]
        assert bool(by_layer) == (name in outcome.metrics)
        if by_layer:
            np.testing.assert_allclose(outcome.metrics[name], np.max(by_layer, 1), rtol=1e-4)
        if f"{name}/layer_01" in outcome.metrics:
            np.testing.assert_allclose(outcome.metrics[f"{name}/layer_01"], np.transpose(by_layer)[1], rtol=1e-4)
    heldout = [event for event in events if event["event"] == "evaluation"][-1]
    assert set(outcome.heldout) - {"loss/second_half"} == {"loss", "loss/en", "bits_per_byte/en"}
    for name, value in outcome.heldout.items():
        assert name == "loss/second_half" or value == pytest.approx(heldout[name], rel=1e-5), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rates and seeds": ({}, {"optimizer.peak_lr": (1e-3, 1e-2), "seed": (1, 2)}),
    "shares": (
        {"train.steps": 10, "train.eval_every": 10, "train.log_attention_scores": True},
        {"data.blanks.mask": (0.3, 0.0)},
    ),
    "alphas in float16": (
        {"train.precision": "float16", "train.microbatches": 2, "train.steps": 10, "train.eval_every": 10},
        {"train.embedding_shrink.alpha": (0.5, 0.1)},
    ),
    "dropout": (
        {"model.hidden_dropout": 0.1, "train.steps": 10, "train.eval_every": 10},
        {"optimizer.peak_lr": (1e-3, 1e-2)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_together_equals_alone(folder: Path, tmp_path: Path, case: str) -> None:
    changes, axes = CASES[case]
    configs = members(tiny(folder, **changes), axes)
    outcomes = together(configs)
    for number, (config, outcome) in enumerate(zip(configs, outcomes, strict=True)):
        check_equal(outcome, alone(config, tmp_path / str(number)))
    assert len({outcome.losses[-1] for outcome in outcomes}) == len(configs)
    assert all(("loss/second_half" in outcome.heldout) == (case == "shares") for outcome in outcomes)


def test_blocks_of_members_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"train.steps": 12, "train.eval_every": 0}
    configs = members(tiny(folder, **short), {"optimizer.peak_lr": (1e-3, 1e-2, 3e-2, 1e-1)})
    whole = together(configs)
    for block in (1, 2):
        monkeypatch.setattr(sweep_group, "block_size", lambda members, size, block=block: block)
        for one, other in zip(whole, together(configs), strict=True):
            np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
            assert one.heldout == {} == other.heldout


def test_a_diverged_member_does_not_disturb_the_others(folder: Path) -> None:
    short = {"train.steps": 12, "train.eval_every": 0, "optimizer.warmup_samples": 0}
    calm = {"calm": {"optimizer.peak_lr": 1e-3}}
    (lonely,) = together(members(tiny(folder, **short), {"lr": calm}))
    both = together(members(tiny(folder, **short), {"lr": {**calm, "wild": {"optimizer.peak_lr": 1e16}}}))
    assert not np.isfinite(both[1].losses[-1])
    np.testing.assert_allclose(both[0].losses, lonely.losses, rtol=1e-6)


def test_what_guessing_costs(folder: Path) -> None:
    short = {"train.steps": 12, "train.eval_every": 0, "data.blanks.mask": 0.0}
    (config,) = members(tiny(folder, **short), {"seed": (1,)})
    (outcome,) = together([config])
    assert outcome.uniform == math.log(300)
    prepared = sweep_group.prepare_all([config], quiet)
    streams = sweep_group.Streams([config], prepared)
    targets = [(streams.at(step).targets, streams.at(step).loss_mask) for step in range(1, 13)]
    tokens = np.concatenate([tokens[mask > 0] for tokens, mask in targets])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert outcome.unigram == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_members_share_what_they_read(folder: Path) -> None:
    axes = {"seed": (1, 2), "optimizer.peak_lr": (1e-3, 1e-2), "data.blanks.gmask": (0.7, 0.0)}
    configs = members(tiny(folder), axes)
    streams = sweep_group.Streams(configs, sweep_group.prepare_all(configs, quiet))
    assert streams.of_member.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert streams.at(1).tokens.shape == (4, 1, 4, 32)


def test_block_size() -> None:
    assert block_size(12, 1) == 12
    assert block_size(15, sweep_group.CACHED // 4) == 3
    assert block_size(7, sweep_group.CACHED // 4) == 1
    assert block_size(15, 1 << 40) == 1


@pytest.mark.oldest
def test_progress_counts_the_steps(folder: Path) -> None:
    configs = members(tiny(folder, **{"train.steps": 5, "train.eval_every": 0}), {"seed": (1,)})
    told: list[int] = []
    sweep_group.train(configs, sweep_group.prepare_all(configs, quiet), told.append)
    assert told == [1, 2, 3, 4, 5]


class Killed(Exception):
    """In place of a kill."""


def test_an_interrupted_group_ends_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    axes = {"seed": (1, 2), "optimizer.peak_lr": (1e-3, 1e-2)}
    configs = members(tiny(folder, **{"train.steps": 6, "train.eval_every": 0}), axes)
    prepared = sweep_group.prepare_all(configs, quiet)
    undisturbed = sweep_group.train(configs, prepared, lambda step: None)
    times = itertools.count(0, 100)  # each look at the clock is later than the time between two savings

    def kept(digest: str = "these members") -> Unfinished:
        return Unfinished(tmp_path / "unfinished" / "group.npz", digest, lambda: float(next(times)))

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        sweep_group.train(configs, prepared, kill, kept())
    told: list[int] = []
    resumed = sweep_group.train(configs, prepared, told.append, kept())
    assert told == [1, 2, 3, 4, 5, 6]
    for before, after in zip(undisturbed, resumed, strict=True):
        assert before.losses.tobytes() == after.losses.tobytes() and before.unigram == after.unigram
        assert {name: array.tobytes() for name, array in before.metrics.items()} == {
            name: array.tobytes() for name, array in after.metrics.items()
        }


def test_steps_of_others_and_damaged_files_are_not_used(folder: Path, tmp_path: Path) -> None:
    (config,) = members(tiny(folder, **{"train.steps": 2, "train.eval_every": 0}), {"seed": (1,)})
    step, states, streams = sweep_group.begin([config], sweep_group.prepare_all([config], quiet))
    path = tmp_path / "group.npz"
    metrics = {"lr": np.array([0.1])}
    assert Unfinished(path, "mine").load(states, lambda: metrics) is None
    Unfinished(path, "mine").save(Steps(states, [metrics, {"lr": np.array([0.2])}], np.array([[3.0]])))
    found = Unfinished(path, "mine").load(states, lambda: metrics)
    assert found and found.counts.item() == 3 and [one["lr"].item() for one in found.metrics] == [0.1, 0.2]
    assert Unfinished(path, "another's").load(states, lambda: metrics) is None
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:200] + bytes(200) + content[400:]):
        path.write_bytes(damaged)
        assert Unfinished(path, "mine").load(states, lambda: metrics) is None


def test_data_and_params_have_seeds_of_their_own(folder: Path) -> None:
    configs = members(tiny(folder), {"seed": (1, 2), "model_seed": (5, 6)})
    _, states, streams = sweep_group.begin(configs, sweep_group.prepare_all(configs, quiet))
    assert streams.of_member.tolist() == [0, 0, 1, 1]
    words = np.asarray(states.params["embedding"]["word"])  # [members, V, D]
    assert (words[0] == words[2]).all() and (words[1] == words[3]).all() and (words[0] != words[1]).any()
    (alone,) = members(tiny(folder), {"seed": (5,)})  # without a seed of its own, the model takes this one
    assert alone.params_seed == configs[0].params_seed == 5 and alone.model_seed == -1
