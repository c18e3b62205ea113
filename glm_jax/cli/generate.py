"""`glm-jax generate`: fill the blanks of a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.errors import UserError, printable


def run(arguments: Sequence[str]) -> int:
    """Fill the blanks of a prompt with the model of a workdir."""
    values = common.flag_values("generate", "--workdir runs/quickstart --prompt 'Return a new [MASK] of given shape.'")
    common.define_workdir(values)
    flags.DEFINE_string("prompt", None, "text with [MASK] or [gMASK] in it", flag_values=values)
    flags.DEFINE_enum("strategy", "greedy", ["greedy", "sample"], "how tokens are chosen", flag_values=values)
    flags.DEFINE_integer("max_tokens", 64, "maximum number of tokens in a blank", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "temperature of sampling", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer(
        "top_k", 0, "sample from this many of the likeliest tokens, 0: all", lower_bound=0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        0.7,
        "sample from the likeliest tokens with this much probability in all",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 1234, "seed of sampling", lower_bound=0, upper_bound=2**63 - 1, flag_values=values)
    if not common.parse(values, arguments, ["workdir", "prompt"]):
        return 0

    from glm_jax.inference import Model
    from glm_jax.inference.fill import fill
    from glm_jax.inference.strategies import GREEDY, Sampling

    model = Model.open(values.workdir)
    if model.tokenizer is None:
        raise UserError(f"{values.workdir} has no tokenizer: convert its weights again, with --tokenizer FILE")
    sampled = Sampling(values.temperature, values.top_k, values.top_p)
    sampling = sampled if values.strategy == "sample" else GREEDY
    pieces = fill(
        model.config,
        model.params,
        model.tokenizer,
        values.prompt,
        max_tokens=values.max_tokens,
        sampling=sampling,
        seed=values.seed,
        say=say,
    )
    underline, plain = ("\x1b[4m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    for piece in pieces:
        shown = underline + printable(piece.text, keep="\n\t") + plain
        print(shown if piece.filled else piece.text, end="")
    print()
    return 0
