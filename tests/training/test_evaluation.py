"""The batches of a run and of its evaluation, as the config sets them."""

import json

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax.config import default_config, instructions, resolve, source, with_changes
from glm_jax.config.data import OBJECTIVES
from glm_jax.config.fields import flatten
from glm_jax.data.corpora.prepare import prepare
from glm_jax.data.rows.experiment import heldout_batches, training_batches
from glm_jax.training.observers import Observer, Step
from glm_jax.training.run import Run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a config of two sources, one four times as large as the other, and a set of sums."""
    folder = tmp_path_factory.mktemp("corpus")
    sentence = "the cat sat on a mat and saw many birds fly over old grey hills near"
    words = sentence.split()
    random = np.random.default_rng(0)
    for name, count in (("small", 40), ("large", 160)):
        texts = [" ".join(random.choice(words, 60)) + ". " + " ".join(random.choice(words, 20)) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    sums = [json.dumps({"text": f"{i}+1=", "target": str(i + 1)}) for i in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(sums))
    config = default_config()
    config.data.cache = str(folder / "cache")
    config.data.sources = {name: source(path=str(folder / f"{name}.txt")) for name in ("small", "large")}
    config.data.instructions = {"sums": instructions(path=str(folder / "sums.jsonl"))}
    config.data.near_duplicates = 0.0
    config.data.tokenizer.vocab_size = 400
    config.data.seq_length = 64
    config.data.blanks.update({"mask": 0.3, "gmask": 0.5, "smask": 0.1, "instruction": 0.1, "gmask_eop": False})
    return resolve(config)


def changed(config, **data):
    """Return the config with changes to its section data."""
    return with_changes(config, dict(flatten({"data": data})))


def test_training_rows_follow_the_shares_the_options_and_the_instructions(config):
    prepared = prepare(config, lambda line: None)
    batches = training_batches(config, prepared)
    batch = batches.at(0, 200)
    assert batches.sources == ("large", "small", "sums")
    counts = np.bincount(batch.objective, minlength=4)
    assert np.abs(counts - [60, 100, 20, 20]).max() <= 3
    gmask = batch.objective == OBJECTIVES.index("gmask")
    assert not (batch.targets[gmask] == prepared.tokenizer.eop).any()
    row = int(np.flatnonzero(batch.objective == OBJECTIVES.index("instruction"))[0])
    number, answer = prepared.tokenizer.decode(batch.tokens[row][batch.segments[row] == 1]).split("+1=")
    assert answer == str(int(number) + 1)


def test_evaluation_leaves_instructions_and_histories_out(config):
    prepared = prepare(config, lambda line: None)
    config = changed(config, blanks={"history": ((0, {"mask": 1.0}),), "replacement": True})
    for batches in heldout_batches(config, prepared).values():
        batch = batches.at(0, 20)
        assert set(np.unique(batch.objective)) == {0, 1, 2}
    assert (training_batches(config, prepared).at(0, 20).objective == 0).all()


def test_weights_may_follow_sizes_or_a_history(config):
    prepared = prepare(config, lambda line: None)
    blanks = {"instruction": 0.0}
    for more, share in (
        ({}, 0.5), ({"temperature": 1.0}, 0.8), ({"temperature": 2.0}, 2 / 3),
        ({"weights": ((0, {"large": 1.0, "small": 0.0}),)}, 1.0),
    ):  # fmt: skip
        batch = training_batches(changed(config, blanks=blanks, **more), prepared).at(0, 300)
        assert (batch.source == 0).mean() == pytest.approx(share, abs=0.03)


class Compiled(Observer):
    """Counts what is compiled in a step."""

    def __init__(self) -> None:
        self.names, self.steps = list[str](), list[list[str]]()
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith(("trace_duration", "backend_compile_duration")):
            self.names.append(str(kwargs.get("fun_name")))

    def before(self, run: Run) -> None:
        run.stretch._await_compiling()
        self.names.clear()

    def after(self, step: Step) -> None:
        self.steps.append([*self.names])


@pytest.mark.slow
def test_the_step_is_compiled_while_the_first_evaluation_runs(config):
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 32}
    changes = {f"model.{key}": size for key, size in sizes.items()} | {"train.steps": 1, "train.eval_rows": 4}
    with glm_jax.load(with_changes(config, changes), say=lambda line: None) as run:
        compiled = Compiled()
        run.observers = [compiled, *run.observers]
        (step,) = run.steps()
        assert np.isfinite(step.loss) and compiled.steps == [[]]
        compiled.before(run)
        jax.jit(lambda x: x + 2)(1.0)
        assert compiled.names  # it counts
