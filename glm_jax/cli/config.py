"""`glm-jax config`: list experiments, show their values, explain all keys."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.experiments import summaries
from glm_jax.config import by_key, default_values
from glm_jax.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """List the experiments (`config list`), show the values of one (`show`), explain all keys (`keys`)."""
    usage = "glm-jax config list|keys, or glm-jax config show --config NAME [--config.KEY=VALUE ...]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}")
        return 0
    if arguments[0] == "list" and len(arguments) == 1:
        return _list_experiments()
    if arguments == ["keys"]:
        from glm_jax.config.reference import reference

        print("\n".join(reference()))
        return 0
    if arguments[0] == "show":
        return _show_config(arguments[1:])
    raise UserError(f"unknown arguments {' '.join(arguments)}: use {usage}")


def _list_experiments() -> int:
    found = list(summaries())
    if not found:
        raise UserError("this installation has no experiments: name a file, --config path/to/experiment.py")
    for name, summary in found:
        print(f"{name:24} {summary}")
    return 0


def _show_config(arguments: Sequence[str]) -> int:
    values = common.flag_values("config show", "--config quickstart")
    common.define_config(values)
    flags.DEFINE_bool("specs", False, "show how the mesh splits every array of the state instead", flag_values=values)
    if not common.parse(values, arguments, ["config"]):
        return 0
    resolved = common.load(values)
    if values.specs:
        from glm_jax.planning import layout

        print("\n".join(layout.table(layout.layout(resolved))))
        return 0
    defaults = default_values({"sources": resolved.data.sources, "instructions": resolved.data.instructions})
    changes, file = common.changes(values), common.experiment_file(values)
    for key, value in by_key(resolved).items():
        if key in changes:
            origin = f"--config.{key}"
        elif key in defaults and defaults[key] == value:
            origin = "default"
        else:
            origin = str(file)
        print(f"{key:36} {value!r:24} {origin}")
    return 0
