"""The members that a sweep expands to, and which of them one program can train."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.config import Config, default_config, resolve, source, with_changes
from glm_jax.errors import UserError
from glm_jax.sweeps import members as sweep_members
from glm_jax.sweeps import run
from glm_jax.sweeps.group import data_key
from glm_jax.sweeps.members import chosen, expand, group, read_axes

AXES = {
    "model.norm": ("post", "deepnorm"),
    "feedforward": {
        "geglu": {"model.activation": "geglu", "model.ffn_size": 172},
        "gelu": {"model.activation": "gelu", "model.ffn_size": 258},
    },
    "optimizer.peak_lr": (1e-3, 0.01),
    "seed": (1, 2, 3),
}


def base(**changes: Any) -> Config:
    config = default_config()
    config.data.sources.en = source(path="text.txt")
    return with_changes(resolve(config), changes)


def test_every_combination_is_a_member_the_last_axis_fastest() -> None:
    members = expand(base(), read_axes(AXES))
    assert len(members) == 2 * 2 * 2 * 3
    assert members[0].name == "norm=post,feedforward=geglu,peak_lr=0.001,seed=1"
    assert members[1].name == "norm=post,feedforward=geglu,peak_lr=0.001,seed=2"
    last = members[-1]
    assert last.name == "norm=deepnorm,feedforward=gelu,peak_lr=0.01,seed=3"
    assert last.labels == {"model.norm": "deepnorm", "feedforward": "gelu", "optimizer.peak_lr": "0.01", "seed": "3"}
    assert last.changes == {"model.norm": "deepnorm", "model.activation": "gelu", "model.ffn_size": 258,
                            "optimizer.peak_lr": 0.01, "seed": 3}  # fmt: skip
    assert (last.config.model.ffn_size, last.config.seed, last.config.train.steps) == (258, 3, 1000)
    assert len({member.name for member in members}) == len(members)


def test_axes_whose_last_parts_are_alike_keep_their_keys() -> None:
    axes = read_axes({"data.seed": (5,), "seed": (1,)})
    assert [member.name for member in expand(base(), axes)] == ["data.seed=5,seed=1"]


def test_groups_differ_in_what_is_no_array() -> None:
    groups = group(expand(base(), read_axes(AXES)))
    assert [len(part.members) for part in groups] == [6, 6, 6, 6]
    assert [part.name for part in groups][:2] == ["01 norm=post,feedforward=geglu", "02 norm=post,feedforward=gelu"]
    blanks = {"data.blanks.mask": (0.0, 0.3), "data.seed": (1, 2), "optimizer.warmup_samples": (10, 20)}
    assert len(group(expand(base(), read_axes(blanks)))) == 1
    for axis in ({"train.steps": (10, 20)}, {"train.precision": ("float32", "float16")},
                 {"train.embedding_shrink.alpha": (1.0, 0.1)}, {"data.tokenizer.vocab_size": (500, 600)}):  # fmt: skip
        assert len(group(expand(base(), read_axes(axis)))) == 2, axis
    assert len(group(expand(base(), read_axes({"train.embedding_shrink.alpha": (0.2, 0.1)})))) == 1


def test_dropout_makes_the_seed_a_part_of_the_program() -> None:
    axes = read_axes({"seed": (1, 2), "optimizer.peak_lr": (0.1, 0.2)})
    assert len(group(expand(base(), axes))) == 1
    assert [len(part.members) for part in group(expand(base(**{"model.hidden_dropout": 0.1}), axes))] == [2, 2]


def test_groups_are_chosen_by_the_labels_of_a_member() -> None:
    groups = group(expand(base(), read_axes({"model.norm": ("pre", "post"), "seed": (1, 2)})))
    assert chosen(groups, "") == groups
    assert [part.members for part in chosen(groups, "norm=post,seed=2")] == [groups[1].members]
    with pytest.raises(UserError, match=r"--only norm=posted: no member has all .*; names are such as norm=pre,seed=1"):
        chosen(groups, "norm=posted")


def test_a_large_group_is_split() -> None:
    groups = group(expand(base(), read_axes({"seed": tuple(range(5))})), together=2)
    assert [[member.labels["seed"] for member in part.members] for part in groups] == [["0", "1"], ["2", "3"], ["4"]]
    assert [part.name for part in groups] == ["01 all", "02 all", "03 seed=4"]


@pytest.mark.parametrize(
    "axes, said",
    [
        ({}, "not empty"),
        ([1, 2], "a dict of axes"),
        ({"seed": 3}, "the axis 'seed' is 3"),
        ({"seed": ()}, "the axis 'seed' is ()"),
        ({"lr,wd": (1, 2)}, "the axis 'lr,wd'"),
        ({"seed": (1, 1)}, "repeat"),
        ({"model.norm": ("a/b",)}, "cannot name a file"),
        ({"norm": {"pre": "pre"}}, "a label with keys to set"),
    ],
)
def test_invalid_axes(axes: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read_axes(axes, "some.py")
    assert said in str(raised.value) and "some.py" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "axes, said",
    [
        ({"model.nrom": ("pre",)}, "nrom=pre: unknown config key model.nrom: did you mean model.norm"),
        ({"model.norm": ("pre", "batch")}, "norm=batch: model.norm is 'batch'"),
        ({"seed": ("x",)}, "seed=x: seed is 'x'"),
        ({"mesh.data": (2,)}, "mesh.data is 2, members of a sweep run with 1"),
        ({"train.init_from": ("runs",)}, "train.init_from is 'runs', members of a sweep run with ''"),
        ({"train.skip_steps": (((1, 2),),)}, "train.skip_steps"),
        ({"model.norm": ("pre",), "again": {"x": {"model.norm": "post"}}}, "the axis again sets model.norm"),
    ],
)
def test_invalid_members(axes: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        expand(base(), {name: dict(labels) for name, labels in _plain(axes).items()})
    assert said in str(raised.value) and "\n" not in str(raised.value)


def _plain(axes: Any) -> Any:
    """Write out axes of values, without checking that their labels can name files."""
    return {
        name: values if isinstance(values, dict) else {sweep_members._label(value).replace(" ", ""): {name: value}
                                                       for value in values}
        for name, values in axes.items()
    }  # fmt: skip


def test_a_file_without_axes(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    return None\n")
    with pytest.raises(UserError, match="has no get_sweep"):
        sweep_members.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        sweep_members.load(tmp_path / "nowhere.py")


@pytest.mark.parametrize("path", sorted(Path("experiments/ablations").glob("*.py")), ids=lambda path: path.stem)
def test_the_ablations_expand(path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), namespace)
    members = expand(resolve(namespace["get_config"]()), sweep_members.load(path))
    assert 4 <= len(members) <= 240 and f"--config {path}" in namespace["__doc__"]
    assert f"({len(members)} members)" in namespace["__doc__"].splitlines()[0]


def test_the_two_feed_forwards_have_equal_parameters() -> None:
    path = Path("experiments/ablations/feedforward.py")
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), namespace)
    members = expand(resolve(namespace["get_config"]()), sweep_members.load(path))
    sizes = {member.labels["feedforward"]: member.config.glm(500).num_parameters for member in members}
    assert sizes["gelu"] - sizes["geglu"] == 8 * (33_346 - 33_432)  # as its docstring says, 0.3% of a layer's


def test_an_axis_may_set_a_source(tmp_path: Path) -> None:
    axes = read_axes({"text": {"a": {"data.sources.en": source(path="a.txt")}, "b": {}}})
    members = expand(base(), axes)
    written = json.loads(group(members)[0].to_json(tmp_path))
    assert written["members"][0]["config"]["data"]["sources"]["en"]["path"] == "a.txt"
    assert run._describe(Path("experiments/ablations/norms.py"), base(), axes, members)["members"] == [
        "text=a", "text=b"]  # fmt: skip


def test_members_share_prepared_data_only_if_the_same_samples_fit() -> None:
    sums = {"data.instructions.sums.path": "sums.jsonl"}
    for change in ({"data.seq_length": 128}, {"data.blanks.instruction_segments": 1}):
        assert data_key(base(**sums)) != data_key(base(**sums, **change))
        assert data_key(base()) == data_key(base(**change))  # text alone depends on neither
    assert data_key(base(**sums)) == data_key(base(**sums, seed=5)) != data_key(base())
