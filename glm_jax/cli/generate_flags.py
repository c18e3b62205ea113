"""The flags of `glm-jax generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from absl import flags

from glm_jax.cli import common
from glm_jax.config.fields import local_path
from glm_jax.errors import UserError

ALL = ("greedy", "sample", "beam")
TOP_P = 0.7  # of --strategy sample, as in the script that was released with GLM-130B
MAX_TOKENS = 64


class Option(NamedTuple):
    """A flag that sets an option of `glm_jax.inference.strategies`; the help's defaults are those of that module."""

    name: str  # there
    strategies: tuple[str, ...]  # that take it
    define: Callable[..., object]
    help: str
    bounds: Mapping[str, float] = {}


class _BiasParser(flags.ArgumentParser[tuple[int, float]]):
    """Take TOKEN=VALUE."""

    def parse(self, argument: str) -> tuple[int, float]:
        token, _, value = argument.partition("=")
        try:
            return int(token), float(value)
        except ValueError:
            raise ValueError("it must be TOKEN=VALUE, such as 17=-2.5") from None

    def flag_type(self) -> str:
        return "TOKEN=VALUE"


class _MeshParser(flags.ArgumentParser[dict[str, int]]):
    """Take sizes of axes, such as data=1,pipeline=2."""

    def parse(self, argument: str | Mapping[str, int]) -> dict[str, int]:
        if not isinstance(argument, str):
            return dict(argument)
        try:
            pairs = [(axis, int(size)) for axis, _, size in (part.partition("=") for part in argument.split(","))]
        except ValueError:
            raise ValueError("it must be sizes of axes, such as data=1,pipeline=2,tensor=2") from None
        sizes = dict(pairs)
        if len(sizes) < len(pairs):
            raise ValueError("an axis is named twice")
        return sizes

    def flag_type(self) -> str:
        return "sizes"


def _define_bias(name: str, default: None, summary: str, flag_values: flags.FlagValues) -> None:
    flags.DEFINE_multi(_BiasParser(), flags.ArgumentSerializer(), name, default, summary, flag_values)


OPTIONS: dict[str, Option] = {
    "temperature": Option(
        "temperature", ("sample",), flags.DEFINE_float,
        "of --strategy sample: divides the logits; above 1 is bolder, 0 is greedy (default: 1.0)", {"lower_bound": 0.0},
    ),
    "top_k": Option(
        "top_k", ("sample",), flags.DEFINE_integer,
        "of --strategy sample: sample from this many of the likeliest tokens; 0: all (default: 0)", {"lower_bound": 0},
    ),
    "top_p": Option(
        "top_p", ("sample",), flags.DEFINE_float,
        f"of --strategy sample: sample from the likeliest tokens with this much probability in all (default: {TOP_P})",
        {"lower_bound": 0.0, "upper_bound": 1.0},
    ),
    "beams": Option(
        "count", ("beam",), flags.DEFINE_integer,
        "of --strategy beam: how many candidates are kept (default: 4)", {"lower_bound": 1, "upper_bound": 256},
    ),
    "length_penalty": Option(
        "length_penalty", ("beam",), flags.DEFINE_float,
        "of --strategy beam: above 0 longer fills win more often, below 0 shorter ones (default: 1.0)",
        {"lower_bound": -10.0, "upper_bound": 10.0},
    ),
    "no_repeat_ngram": Option(
        "no_repeat_ngram", ("beam",), flags.DEFINE_integer,
        "of --strategy beam: no fill has so many tokens in a row twice; 0: it may (default: 0)",
        {"lower_bound": 0, "upper_bound": 64},
    ),
    "sampled_beams": Option(
        "deterministic", ("beam",), flags.DEFINE_bool,
        "of --strategy beam: draw the candidates instead of taking the best",
    ),
    "min_tokens": Option(
        "min_tokens", ALL, flags.DEFINE_integer,
        "a fill has at least this many tokens; 0: it may be empty (default: 1)", {"lower_bound": 0},
    ),
    "repetition_penalty": Option(
        "repetition_penalty", ALL, flags.DEFINE_float,
        "above 1: tokens of the prompt and the fill become less likely to come again (default: 1.0)",
        {"lower_bound": 0.01, "upper_bound": 100.0},
    ),
    "ban": Option(
        "banned", ALL, flags.DEFINE_multi_integer,
        "a token, by its id, that is never generated", {"lower_bound": 0},
    ),
    "bias": Option(
        "bias", ALL, _define_bias,
        "adds VALUE to the logit of a token, given by its id, as in 17=-2.5",
    ),
}  # fmt: skip


def define() -> flags.FlagValues:
    """Return the flags, none of them parsed."""
    values = common.flag_values("generate", "--workdir runs/quickstart --prompt 'Return a new [MASK] of given shape.'")
    common.define_workdir(values)
    _define_prompts(values)
    _define_strategy(values)
    define_model(values)
    common.define_processes(values)
    return values


def _define_prompts(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "prompt",
        None,
        "text with [MASK], [sMASK] or [gMASK] in it; without any it is continued. Without --prompt and --input: a "
        "prompt line on a terminal, else one prompt a line from standard input",
        flag_values=values,
    )
    common.define_path(
        values,
        "input",
        'a file with one prompt a line, or "id TAB prompt"; or .jsonl with "prompt" (or "text") and perhaps "id"; '
        "- is standard input",
    )
    common.define_path(
        values,
        "output",
        "a new file for the results, one a line in the order and form of the input; control characters and ends of "
        "lines in a text are escaped, as in \\n. The same command resumes",
    )
    flags.DEFINE_bool(
        "json", False, "results as JSON, one a line: text, fills with tokens and log-probabilities", flag_values=values
    )


def _define_strategy(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "strategy",
        "greedy",
        list(ALL),
        "how tokens are chosen: the likeliest, drawn, or by beam search",
        flag_values=values,
    )
    summary = f"maximum number of tokens in a blank (default: {MAX_TOKENS})"
    flags.DEFINE_integer("max_tokens", None, summary, lower_bound=1, flag_values=values)
    for name, option in OPTIONS.items():
        option.define(name, None, option.help, flag_values=values, **option.bounds)
    summary = "text that ends a fill and is left out of it"
    flags.DEFINE_multi_string("stop", None, summary, flag_values=values)
    flags.DEFINE_integer(
        "seed", 1234, "seed of whatever is drawn", lower_bound=0, upper_bound=2**63 - 1, flag_values=values
    )
    summary = "read a prompt once for all its [MASK]: faster with many of them in a long prompt"
    flags.DEFINE_bool("one_context", False, summary, flag_values=values)
    summary = "fill by the rules of the official generate.py: prompt and fill together have so many tokens"
    flags.DEFINE_integer("out_seq_length", None, summary, lower_bound=1, flag_values=values)


def define_model(values: flags.FlagValues) -> None:
    """Add the flags that say which model is opened, and how."""
    flags.DEFINE_integer(
        "step", None, "the checkpoint of this step (default: the newest good one)", lower_bound=0, flag_values=values
    )
    summary = "devices to split the model over, such as data=1,pipeline=2,tensor=2 (default: one device)"
    flags.DEFINE(_MeshParser(), "mesh", None, summary, values, flags.ArgumentSerializer())
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16", "bfloat16"],
        "numbers to compute with (default: float32 on CPU, elsewhere those of the training)",
        flag_values=values,
    )
    flags.DEFINE_enum("quantize", None, ["int8", "int4"], "store the weights in fewer bits", flag_values=values)


def check_workdir(values: flags.FlagValues) -> None:
    """Refuse a workdir, or a step, that is not there."""
    from glm_jax.interop import places
    from glm_jax.workdir import folder

    folder.read_config(local_path(values.workdir, "the workdir"))
    places.find(values.workdir if values.step is None else f"{values.workdir}@{values.step}")


def strategy_options(values: flags.FlagValues) -> dict[str, object]:
    """Return the options of the strategy that were given, by their names in `glm_jax.inference.strategies`.

    Raises:
        UserError: the strategy does not take one of them.
    """
    found: dict[str, object] = {}
    for flag, option in OPTIONS.items():
        if (value := values[flag].value) is None:
            continue
        if values.strategy not in option.strategies:
            raise UserError(
                f"--{flag} is no option of --strategy {values.strategy}: add --strategy {option.strategies[0]}, or "
                "leave it out"
            )
        found[option.name] = not value if flag == "sampled_beams" else value
    if values.strategy == "sample":
        found.setdefault("top_p", TOP_P)
    return found
