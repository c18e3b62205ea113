"""The checks of the config, and its way through JSON."""

import pytest
from ml_collections import ConfigDict

from glm_jax.config import Config, default_config, from_json, resolve, to_json
from glm_jax.config.data import Source
from glm_jax.config.fields import to_dict
from glm_jax.errors import UserError


def with_source() -> Config:
    config = default_config()
    config.data.sources.en = ConfigDict({"sample": "python-docs"})
    return config


def test_resolve_fills_in_what_a_source_leaves_out() -> None:
    resolved = resolve(with_source())
    assert resolved.data.sources["en"] == Source(sample="python-docs")


def test_json_gives_the_config_back() -> None:
    resolved = resolve(with_source())
    assert from_json(to_json(resolved)) == resolved


@pytest.mark.parametrize("text", ["[]", "5", '{"seed": 12'])
def test_what_is_no_json_object_is_no_config(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_an_int_may_stand_for_a_float_and_nothing_else_is_converted() -> None:
    config = with_source()
    config.optimizer = ConfigDict({"peak_lr": 1})
    resolved = resolve(config)
    assert resolved.optimizer.peak_lr == 1.0 and isinstance(resolved.optimizer.peak_lr, float)
    config.model = ConfigDict({"num_layers": 2.0})
    with pytest.raises(UserError, match="model.num_layers is 2.0, it must be of type int"):
        resolve(config)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("data.heldout", 1.0, "below 1"),
        ("data.seq_length", 8, "at least 16"),
        ("train.precision", "float8", "float32, bfloat16, float16"),
        ("optimizer.clip_norm", 0.0, "above 0"),
        ("optimizer.warmup_samples", -1, "negative"),
        ("data.sources.en.format", "docx", "text, lines, jsonl"),
        ("data.sources.en.weight", -1.0, "negative"),
        ("data.sources.en.sample", "", "neither path nor sample"),
    ],
)
def test_values_out_of_range_are_refused_by_name(key: str, value: object, said: str) -> None:
    config = ConfigDict(to_dict(resolve(with_source())))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=said) as caught:
        resolve(config)
    assert key.rsplit(".", 1)[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["optimizer", "data.sources", "data.sources.en"])
def test_a_value_in_place_of_a_section_is_refused_by_name(key: str) -> None:
    values = to_dict(resolve(with_source()))
    *path, last = key.split(".")
    part = values
    for name in path:
        part = part[name]
    part[last] = 5
    with pytest.raises(UserError, match=f"^{key} is 5: "):
        resolve(values)


def test_a_config_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="the config is None: "):
        resolve(None)


def test_blanks_need_a_share() -> None:
    config = with_source()
    config.data.blanks = ConfigDict({"mask": 0.0, "gmask": 0.0})
    with pytest.raises(UserError, match="all 0"):
        resolve(config)


def test_a_knot_of_weights_names_all_sources_or_none() -> None:
    config = with_source()
    (name,) = config.data.sources
    config.data.sources.other = config.data.sources[name]
    config.data.weights = ((0, {"a_set": 2.0}), (9, {name: 1.0, "other": 0.0}))
    assert resolve(config).data.weights[1] == (9, {name: 1.0, "other": 0.0})
    config.data.weights = ((0, {name: 1.0, "a_set": 2.0}),)
    with pytest.raises(UserError, match=f"weights at 0 samples name {name} and not other: name all sources, with 0"):
        resolve(config)
