"""The config's section data.blanks, and how it becomes options and shares."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from rows import FIRST, SPECIAL, Documents, build, check_row, equal

import glm_jax
from glm_jax.config import default_config, from_json, instructions, resolve, to_json
from glm_jax.config.data import OBJECTIVES, BlankOptions, Blanks
from glm_jax.data.rows.mixture import Mixture, with_weights
from glm_jax.errors import UserError


def test_the_section_is_the_options_and_the_shares():
    blanks = resolve(default_config()).data.blanks
    assert blanks.options(False) == BlankOptions() and blanks.options(True) == BlankOptions(two_streams=True)
    fields = {field.name for field in dataclasses.fields(BlankOptions)} - {"two_streams"}
    assert set(default_config().data.blanks) == fields | set(OBJECTIVES) | {"history"}
    assert blanks.objectives() == blanks.shares() == {"mask": 0.3, "gmask": 0.7}


def test_a_bad_value_is_named_with_its_section():
    config = default_config()
    config.data.blanks.short_seq_prob = 2.0
    with pytest.raises(UserError, match="^data.blanks.short_seq_prob is 2.0, it must be from 0 to 1$"):
        resolve(config)
    with pytest.raises(ValueError, match="^short_seq_prob is 2.0"):
        Blanks(short_seq_prob=2.0)


def test_histories_are_whole_in_the_config_and_survive_json():
    config = default_config()
    config.data.blanks.history = [(0, {"mask": 1}), (900, {"mask": 0.3, "gmask": 0.7})]
    config.data.weights = ((0, {"en": 1.0}), (500, {"en": 1.0, "zh": 3.0}))
    config.data.instructions = {"reviews": instructions(sample="chinese-reviews", cap=10)}
    resolved = resolve(config)
    assert resolved.data.blanks.objectives() == ((0, {"mask": 1.0}), (900, {"mask": 0.3, "gmask": 0.7}))
    again = from_json(to_json(resolved))
    assert again == resolved
    assert again.data.weights[1] == (500, {"en": 1.0, "zh": 3.0}) and again.data.instructions["reviews"].cap == 10


@pytest.mark.parametrize("history", [[0, {"mask": 1.0}], [(0.5, {"mask": 1.0})], [(0, 1.0)], [(0, {"mask": "1"})], 3])
def test_a_broken_history_is_refused(history):
    config = default_config().to_dict()
    config["data"]["blanks"]["history"] = history
    with pytest.raises(UserError, match="data.blanks.history"):
        resolve(ConfigDict(config, convert_dict=True))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1.0}, "neither path nor sample"),
        ({"path": "a", "cap": -1}, "cap is -1, it must not be negative"),
        ({"path": "a", "caps": 1}, "did you mean data.instructions.tasks.cap"),
        (3, "give it keys"),
    ],
)
def test_mistakes_in_instructions_are_refused(entry, message):
    config = default_config().to_dict()
    config["data"]["instructions"] = {"tasks": entry}
    with pytest.raises(UserError, match=f"data.instructions.tasks.*{message}"):
        resolve(ConfigDict(config))


def test_no_share_at_all_is_refused():
    config = default_config()
    config.data.blanks.mask = config.data.blanks.gmask = 0.0
    with pytest.raises(UserError, match="are all 0"):
        resolve(config)
    config.data.blanks.smask = 1.0
    assert resolve(config).data.blanks.smask == 1.0


def test_batches_take_the_section_unchanged():
    batch, same = build(objectives=Blanks().objectives()).at(0, 20), build().at(0, 20)
    assert equal(batch, same)
    history = ((0, {"smask": 1.0, "gmask": 0.0}), (8, {"smask": 1.0}), (8, {"gmask": 1.0}))
    made = build(objectives=Blanks(history=history).objectives(), sentence_ends=np.ones(FIRST + 6000, bool))
    objectives = [OBJECTIVES[objective] for objective in made.at(0, 16).objective]
    assert objectives == ["smask"] * 8 + ["gmask"] * 8


def test_glm_130b_follows_what_the_released_model_used():
    """Four chunks of 500 tokens, cut to 512 places; no eop after [gMASK]; rows with replacement; 5% instructions."""
    path = Path(glm_jax.__file__).parents[1] / "experiments" / "glm_130b.py"
    spec = importlib.util.spec_from_file_location("glm_130b", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    blanks = resolve(module.get_config()).data.blanks
    shares = {"mask": 0.285, "gmask": 0.665, "instruction": 0.05}
    assert blanks.objectives() == shares
    options = blanks.options(False)
    assert options == BlankOptions(
        single_span_prob=0.02, short_seq_prob=0.02, shortest_seq=32, gmask_eop=False, mask_segments=4,
        instruction_segments=4, cut_targets=True, replacement=True,
    )  # fmt: skip
    shares = {"mask": 0.3, "gmask": 0.7}
    made = build({"en": Documents([30_000] * 4)}, seq_length=2048, objectives=shares, options=options)
    batch = made.at(0, 40)
    for b in range(40):
        assert made.text(made.locate(b)).size in range(1985, 2001)
        segments = np.bincount(batch.segments[b])[1:]
        if OBJECTIVES[batch.objective[b]] == "mask":
            assert len(segments) == 4 and segments.max() == 512
        else:
            check_row(batch, b, options)
            assert len(segments) == 1 and not (batch.targets[b] == SPECIAL.eop).any()


def test_short_samples_of_the_reference_keep_32_tokens():
    options = BlankOptions(short_seq_prob=1.0, shortest_seq=32, cut_targets=True, mask_segments=4)
    made = build({"en": Documents([30_000])}, seq_length=2048, objectives={"mask": 1.0}, options=options)
    batch = made.at(0, 60)
    text = np.where(batch.context, batch.tokens != SPECIAL.mask, batch.targets != SPECIAL.eop)  # [B, S]
    lengths = [np.bincount(row[told])[1:] for row, told in zip(batch.segments, text, strict=True)]
    assert all(len(segments) == 4 for segments in lengths)
    assert 32 <= np.min(lengths) < 50 and np.max(lengths) > 450


def test_a_history_leaves_out_what_keeps_its_weight():
    entries = {"en": 2.0, "zh": 1.0, "tasks": 3.0}
    assert with_weights({}, entries) == entries
    history = [(0, {"en": 1.0}), (9, {"zh": 4.0, "tasks": 0.0})]
    assert with_weights(history, entries) == [
        (0, {"en": 1.0, "zh": 1.0, "tasks": 3.0}), (9, {"en": 2.0, "zh": 4.0, "tasks": 0.0})
    ]  # fmt: skip


def test_an_objective_keeps_its_share_whatever_its_sources_weigh():
    labels = [("en", "mask"), ("en", "gmask"), ("tasks", "instruction")]
    shares = {"mask": 0.285, "gmask": 0.665, "instruction": 0.05}
    for weights in ({"en": 1.0, "tasks": 1.0}, {"en": 0.01, "tasks": 90_000.0}):
        assert Mixture(labels, weights, shares).counts(10_000) == pytest.approx([2850, 6650, 500], abs=1)
    assert Mixture(labels, {"en": 1.0}, shares).counts(1000) == pytest.approx([300, 700, 0], abs=1)
