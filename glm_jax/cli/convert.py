"""`glm-jax convert`: official checkpoints to ours and back."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """Convert official checkpoints to ours (`convert sat-to-orbax`) and back (`convert orbax-to-sat`)."""
    if not arguments or arguments[0] not in ("sat-to-orbax", "orbax-to-sat"):
        usage = "glm-jax convert sat-to-orbax|orbax-to-sat --config FILE --path FROM --out TO [flags]"
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {usage}")
            return 0
        raise UserError(f"name the direction to convert in: {usage}")
    direction, *rest = arguments
    values = common.flag_values(f"convert {direction}", "--config glm_130b --path FROM --out TO")
    common.define_config(values)
    common.define_path(values, "path", "the directory to read, with `latest` or steps in it")
    common.define_path(values, "out", "the directory to write")
    if direction == "orbax-to-sat":
        flags.DEFINE_integer("tensor_parallel", 1, "number of files to write", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("iteration", None, "the iteration in its name; by default the step", flag_values=values)
        flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "dtype of the files", flag_values=values)
    if not common.parse(values, rest, ["config", "path", "out"]):
        return 0
    resolved = common.load(values)
    if not resolved.model.vocab_size:
        raise UserError("model.vocab_size is 0: give the number of rows of the embedding, --config.model.vocab_size=N")

    from glm_jax.interop.convert import orbax_to_sat, sat_to_orbax

    cfg = resolved.glm(0)
    try:
        if direction == "sat-to-orbax":
            written = sat_to_orbax(values.path, cfg, values.out)
        else:
            orbax_to_sat(values.path, cfg, values.out, values.tensor_parallel, values.iteration, values.dtype)
            written = values.out
    except OSError as error:
        raise UserError(f"--path {values.path} cannot be converted to --out {values.out} ({error}): fix that, or "
                        "name another directory") from error  # fmt: skip
    say(f"written: {written}")
    return 0
