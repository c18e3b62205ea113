"""Every limit at its edge: the last value accepted, the first one refused, and the line that says why."""

import dataclasses
import math
from typing import Any

import pytest

from glm_jax.cli import main
from glm_jax.config import Config, default_config, instructions, keys, resolve, source
from glm_jax.config.data import BlankOptions
from glm_jax.errors import UserError

AT_LEAST_1 = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.ffn_size",
    "model.vocab_multiple",
    "data.tokenizer.vocab_size",
    "train.steps",
    "train.global_batch",
    "train.microbatches",
    "train.log_every",
    "train.eval_rows",
    "train.save_every",
    "train.keep",
    "train.spike.window",
    "train.loss_scale.window",
    "train.loss_scale.hysteresis",
]
AT_LEAST_0 = [
    "model.vocab_size",
    "model.max_length",
    "train.eval_every",
    "train.keep_every",
    "train.save_minutes",
    "train.spike.rollbacks",
    "optimizer.warmup_samples",
    "optimizer.weight_decay",
    "data.temperature",
    "data.blanks.mask",
    "data.blanks.gmask",
    "data.blanks.smask",
    "data.blanks.instruction",
]
ABOVE_0 = [
    "optimizer.clip_norm",
    "train.spike.deviations",
    "train.loss_scale.initial",
    "train.loss_scale.minimum",
    "mesh.collective_timeout",
]
FROM_0_BELOW_1 = [
    "model.attention_dropout",
    "model.hidden_dropout",
    "data.heldout",
    "data.near_duplicates",
    "optimizer.beta1",
    "optimizer.beta2",
]
MUCH = ("model.hidden_size",)  # other rules demand more

NEAR_1 = math.nextafter(1.0, 0.0)


def build(changes: dict[str, Any]) -> Config:
    config = default_config()
    config.data.sources.en = source(path="x.txt")
    config.data.instructions.tasks = instructions(path="x.jsonl")
    config.model.num_heads = config.train.global_batch = config.train.microbatches = 1
    config.unlock()
    config.update_from_flattened_dict(changes)
    return resolve(config)


EDGES: list[tuple[str, Any, Any, str]] = [
    ("seed", 0, -1, "from 0 to 2"),
    ("seed", 2**63 - 1, 2**63, "from 0 to 2"),
    ("data.seq_length", 16, 15, "at least 16"),
    ("train.embedding_shrink.alpha", 0.0, -1e-9, "from 0 to 1"),
    ("train.embedding_shrink.alpha", 1.0, 1 + 1e-9, "from 0 to 1"),
    ("train.embedding_shrink.history", ((5, 0.0), (6, 1.0)), ((5, 0.1), (5, 1.0)), "put them in order"),
    ("train.embedding_shrink.history", ((5, 1.0),), ((5, 1.1),), "from 0 to 1"),
    ("train.skip_steps", ((1, 1),), ((0, 1),), "steps count from 1"),
    ("train.skip_steps", ((1, 1), (4, 4)), ((1, 1), (4, 3)), "the first must not be after the last"),
    ("train.profile", (1, 1), (0, 1), "steps count from 1"),
    ("train.profile", (2, 2), (2, 1), "the first must not be after the last"),
    ("optimizer.rewarm", ((0, 1),), ((-1, 1),), "the step it begins at"),
    ("optimizer.rewarm", ((0, 1),), ((0, 0),), "how many"),
    ("optimizer.stairs", (0, 1, 2), (-1, 1, 2), "the step they begin at"),
    ("optimizer.stairs", (0, 1, 2), (0, 0, 2), "the steps of each"),
    ("optimizer.stairs", (0, 1, 2), (0, 1, 1), "a factor of 2 or more"),
    ("train.batch_ramp", (1, 1, 1), (0, 1, 1), "first batch 0"),
    ("train.batch_ramp", (1, 1, 1), (1, 0, 1), "increment 0"),
    ("train.batch_ramp", (1, 1, 1), (1, 1, 0), "does not reach"),
    ("train.batch_ramp", (1, 1, 1), (2, 1, 1), "does not reach"),
    ("optimizer.min_lr", 1e-3, 1.1e-3, "above optimizer.peak_lr"),
    ("optimizer.peak_lr", 1e-4, 0.9e-4, "above optimizer.peak_lr"),
    ("optimizer.decay_samples", 0, -1, "from 0 to 2"),
    ("optimizer.decay_samples", 2**63 - 1, 2**63, "from 0 to 2"),
    ("mesh.data", -1, 0, "mesh.data is 0"),
    ("mesh.tensor", 1, -2, "at least -1"),
    ("data.seed", -1, -2, "from -1 to 2"),
    ("data.sources.en.weight", 0.0, -1e-9, "must not be negative"),
    ("data.instructions.tasks.weight", 0.0, -1e-9, "must not be negative"),
    ("data.instructions.tasks.cap", 0, -1, "must not be negative"),
    ("interventions", ((0, {"train.steps": 5}),), ((-1, {"train.steps": 5}),), "0 is the start"),
]


@pytest.mark.parametrize("key, taken, refused, said", EDGES)
def test_a_value_at_the_edge_is_accepted_and_the_next_refused(key: str, taken: Any, refused: Any, said: str) -> None:
    build({key: taken})
    with pytest.raises(UserError, match=said) as raised:
        build({key: refused})
    assert key.rsplit(".", 1)[0] in str(raised.value) and "\n" not in str(raised.value)


def typed(key: str, value: float) -> Any:
    section: Any = default_config()
    for part in key.split("."):
        section = section[part]
    return type(section)(value)


@pytest.mark.parametrize(
    "keys, taken, refused, said",
    [
        (AT_LEAST_1, 1, 0, "it must be at least 1"),
        (AT_LEAST_0, 0, -1, "it must not be negative"),
        (ABOVE_0, 5e-324, 0, "it must be above 0"),
        (FROM_0_BELOW_1, 0, -1e-9, "it must be at least 0 and below 1"),
        (FROM_0_BELOW_1, NEAR_1, 1, "it must be at least 0 and below 1"),
    ],
)
def test_numbers_of_a_kind_have_its_limit(keys: list[str], taken: float, refused: float, said: str) -> None:
    for key in keys:
        if key not in MUCH:
            assert build({key: typed(key, taken)}) is not None
        value = typed(key, refused)
        with pytest.raises(UserError) as raised:
            build({key: value})
        assert str(raised.value) == f"{key} is {value}, {said}"


def every_key(*kinds: type) -> list[tuple[str, type]]:
    """Return the keys of some types, as they are called in the config of `build`."""
    entries = {"data.sources.NAME": "data.sources.en", "data.instructions.NAME": "data.instructions.tasks"}
    found = []
    for definition, _ in keys():
        name = definition.name
        for table, entry in entries.items():
            name = name.replace(table, entry)
        if definition.type in kinds:
            found.append((name, definition.type))
    return found


@pytest.mark.parametrize("key, kind", every_key(int, float))
def test_no_number_may_be_minus_seven(key: str, kind: type) -> None:
    with pytest.raises(UserError, match=rf"^{key} is -7(\.0)?, it must "):
        build({key: kind(-7)})


@pytest.mark.parametrize("key, kind", every_key(float))
def test_every_float_is_finite(key: str, kind: type) -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=f"^{key} is {value}, it must be a finite number$"):
            build({key: value})


def test_the_keys_are_many() -> None:
    assert len(every_key(int, float)) > 60 and len(every_key(float)) > 25  # otherwise the two tests above show nothing


def test_all_shares_at_0_are_refused_and_any_one_is_enough() -> None:
    shares = dict.fromkeys((f"data.blanks.{kind}" for kind in ("mask", "gmask", "smask", "instruction")), 0.0)
    with pytest.raises(UserError, match="all 0"):
        build(shares)
    for kind in shares:
        assert build(shares | {kind: 1e-9}) is not None


@pytest.mark.parametrize(
    "name, taken, refused",
    [
        *((name, 1, 0) for name in ("longest_span", "shortest_seq", "mask_segments", "gmask_segments",
                                    "smask_segments", "instruction_segments")),
        *((name, 0.0, -1e-9) for name in ("single_span_prob", "short_seq_prob", "gmask_min_ratio",
                                          "gmask_infill_prob", "block_mask_prob")),
        *((name, 1.0, 1 + 1e-9) for name in ("single_span_prob", "short_seq_prob", "gmask_min_ratio",
                                             "gmask_infill_prob")),
        *((name, 1e-9, 0.0) for name in ("mask_ratio", "smask_ratio", "mean_span")),
        *((name, 0.5, 0.5 + 1e-9) for name in ("mask_ratio", "smask_ratio")),
    ],
)  # fmt: skip
def test_options_of_blanks_have_their_limits(name: str, taken: float, refused: float) -> None:
    values: dict[str, Any] = {name: taken}
    assert getattr(BlankOptions(**values), name) == taken
    values[name] = refused
    with pytest.raises(ValueError, match=f"{name} is {refused}, it must be") as raised:
        BlankOptions(**values)
    assert "\n" not in str(raised.value)


def test_block_masking_needs_its_token() -> None:
    assert BlankOptions(block_mask_prob=1.0, block_mask_token=0).block_mask_token == 0
    with pytest.raises(ValueError, match="dBLOCK"):
        BlankOptions(block_mask_prob=1e-9)
    for quirk in ("cut_targets", "replacement"):
        with pytest.raises(ValueError, match="turn one of them off"):
            dataclasses.replace(BlankOptions(whole_documents=True), **{quirk: True})


GENERATE = "generate --workdir=/nowhere --prompt=[MASK]"


@pytest.mark.parametrize(
    "command, flag, refused",
    [
        (GENERATE, "max_tokens", 0),
        (GENERATE, "temperature", -0.1),
        (GENERATE, "top_k", -1),
        (GENERATE, "top_p", -0.1),
        (GENERATE, "top_p", 1.1),
        (GENERATE, "seed", -1),
        (GENERATE, "seed", 2**63),
        ("train", "processes", 0),
        ("train", "process", -1),
        ("convert orbax-to-sat", "tensor_parallel", 0),
        ("corpus build", "workers", 0),
        ("corpus inspect", "rows", -1),
        ("schedule", "stages", 0),
        ("schedule", "microbatches", 0),
        ("sweep", "parallel", 0),
    ],
)
def test_a_flag_below_its_limit_is_one_line(
    command: str, flag: str, refused: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*command.split(), f"--{flag}={refused}"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and errors.startswith("error: ")
    assert f"--{flag}={refused}" in errors or f"flag --{flag}" in errors
