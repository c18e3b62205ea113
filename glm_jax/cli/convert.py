"""`glm-jax convert`: weights of others to workdirs of ours and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.config import files
from glm_jax.config.fields import to_dict
from glm_jax.errors import UserError

if TYPE_CHECKING:
    from glm_jax.interop.weights import Weights

# the kinds of weights that they read
DIRECTIONS = {
    "sat-to-orbax": ("sat",),
    "hf-to-orbax": ("huggingface",),
    "orbax-to-sat": ("workdir", "orbax"),
    "orbax-to-hf": ("workdir", "orbax"),
    "merge": ("workdir",),
    "quantize": ("workdir", "orbax", "sat", "huggingface"),
}


def run(arguments: Sequence[str]) -> int:
    """Convert official checkpoints and Hugging Face folders to workdirs and back, merge adapters, quantise weights."""
    if not arguments or arguments[0] not in DIRECTIONS:
        usage = f"glm-jax convert {'|'.join(DIRECTIONS)} --path FROM --out TO [flags]"
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {usage}")
            return 0
        raise UserError(f"name the direction to convert in: {usage}")
    direction, *rest = arguments
    values = common.flag_values(f"convert {direction}", "--path FROM --out TO")
    common.define_config(values)
    read = {"sat-to-orbax": "a folder with `latest`", "hf-to-orbax": "a folder with config.json and weights",
            "quantize": "a workdir, WORKDIR@STEP, a step, a folder with `latest` or a Hugging Face folder"}  # fmt: skip
    common.define_path(values, "path", "what to read: " + read.get(direction, "a workdir, WORKDIR@STEP, or a step"))
    common.define_path(values, "out", "the folder to write")
    if direction == "orbax-to-sat":
        flags.DEFINE_integer("tensor_parallel", 1, "number of files to write", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("iteration", None, "the iteration in its name; by default the step", flag_values=values)
    if direction in ("orbax-to-sat", "orbax-to-hf"):
        dtypes = ["float32", "float16"] + ["bfloat16"] * (direction == "orbax-to-hf")
        flags.DEFINE_enum("dtype", "float32", dtypes, "dtype of the files", flag_values=values)
    else:
        common.define_path(values, "tokenizer", "as data.tokenizer.path; by default the folder's own")
    if direction == "quantize":
        _define_scheme(values)
    if not common.parse(values, rest, ["path", "out"] + ["bits"] * (direction == "quantize")):
        return 0

    from glm_jax.interop import places
    from glm_jax.storage.files import check_absent
    from glm_jax.workdir.checkpoint_folders import disk_reason

    try:
        check_absent(Path(values.out))
        kind = places.find(values.path).kind
        if kind not in DIRECTIONS[direction]:
            other = next(name for name, kinds in DIRECTIONS.items() if kind in kinds)
            raise UserError(f"--path {values.path} is for `convert {other}`, not for {direction}")
        given = _given(values)

        from glm_jax.interop.convert import orbax_to_hf, orbax_to_sat
        from glm_jax.interop.weights import open_weights

        weights = open_weights(values.path, given, say)
        if direction == "orbax-to-sat":
            orbax_to_sat(weights, values.out, values.tensor_parallel, values.iteration, values.dtype)
        elif direction == "orbax-to-hf":
            orbax_to_hf(weights, values.out, values.dtype)
        elif direction == "quantize":
            _quantize(values, weights)
        else:
            _to_workdir(values, weights)
    except (OSError, ValueError, RuntimeError) as error:
        if (reason := disk_reason(error)) is None:
            raise
        raise UserError(f"--path {values.path} cannot be converted to --out {values.out} ({reason}): fix that, or "
                        "name another directory") from error  # fmt: skip
    say(f"written: {values.out}")
    return 0


def _define_scheme(values: flags.FlagValues) -> None:
    """Define the flags of `convert quantize`."""
    flags.DEFINE_integer("bits", None, "8 or 4: of each weight in the matrices of blocks", flag_values=values)
    flags.DEFINE_integer(
        "group", None, "most input features that share a scale, 0 for all; by default 0 for 8 bits and for "
        "--format=sat, else 128", flag_values=values
    )  # fmt: skip
    flags.DEFINE_string("rounding", "absmax", "absmax, as the release, or zeropoint", flag_values=values)
    flags.DEFINE_enum("format", "workdir", ["workdir", "sat"], "what to write: a workdir, or the official layout",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("tensor_parallel", 1, "of --format=sat: number of files, with scales of their own",
                         lower_bound=1, flag_values=values)  # fmt: skip


def _quantize(values: flags.FlagValues, weights: Weights) -> None:
    """Quantise and write, as the flags say."""
    from glm_jax.interop.convert import orbax_to_sat, quantize
    from glm_jax.interop.layout import check_ranks
    from glm_jax.model.quantized import GROUPS, Scheme

    official = values.format == "sat"
    if values.tensor_parallel > 1 and not official:
        raise UserError("--tensor_parallel is for --format=sat: a workdir is for any number of devices")
    if official and (values.group or values.rounding != "absmax"):
        raise UserError("--format=sat has one scale a row, rounded by absmax: leave --group and --rounding out")
    group = GROUPS.get(values.bits, 0) if values.group is None and not official else values.group or 0
    scheme = Scheme(values.bits, group, values.rounding, values.tensor_parallel)
    check_ranks(weights.config, scheme.ranks, Path(values.out), scheme.bits)
    weights = quantize(weights, scheme)
    if official:
        orbax_to_sat(weights, values.out, scheme.ranks, weights.step or 0, "float16")
    else:
        _to_workdir(values, weights)


def _given(values: flags.FlagValues) -> Mapping[str, object]:
    """Return what the flags say of the model, by key."""
    if values.config is None:
        return {key.removeprefix("model."): value for key, value in common.changes(values).items()
                if key.startswith("model.")}  # fmt: skip
    model = to_dict(common.load(values).model)
    return {key: value for key, value in model.items() if key not in ("vocab_size", "max_length") or value}


def _to_workdir(values: flags.FlagValues, weights: Weights) -> None:
    """Write the workdir, with the experiment that the flags name."""
    from glm_jax.data.tokenizers.load import read
    from glm_jax.interop.convert import experiment, to_workdir

    base = None if values.config is None else files.config(common.experiment_file(values))
    # an experiment says itself which tokenizer it has
    beside = weights.tokenizer if base is None and weights.kind != "workdir" else None
    file = values.tokenizer or (beside and str(beside.absolute()))
    named = {} if file is None else {"data.tokenizer.path": file}
    config = experiment(weights.config, base, common.changes(values) | named)
    known = config.data.tokenizer
    own = weights.read_tokenizer() if weights.kind == "workdir" and values.tokenizer is None else None
    tokenizer = own or (read(known.path, pinned=known.pinned) if known.path else None)
    to_workdir(weights, values.out, config, tokenizer)
    if tokenizer is None:
        say("the workdir has no tokenizer: to generate, convert with --tokenizer FILE")
