"""What the commands share: their flags, and the messages for flags that are wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from glm_jax.cli.experiments import summaries
from glm_jax.config import Experiment, default_values, resolve
from glm_jax.config.fields import closest
from glm_jax.errors import UserError

ENTRY = "entry"  # the flag that `with_entries` writes
TABLES = ("sources", "instructions")  # of the section data: entries by name


def say(line: str) -> None:
    """Print a message to standard error; standard output holds only results."""
    print(line, file=sys.stderr, flush=True)


def flag_values(command: str, example: str) -> flags.FlagValues:
    """Return a new set of flags with nothing but `--help`, which shows an example of arguments; commands share none."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    shown = f"show the flags of {command}; an example: glm-jax {command} {example}"
    flags.DEFINE_bool("help", False, shown, short_name="h", flag_values=values)
    return values


def define_config(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Add `--config`, with the file that `arguments` name."""
    summary = "an experiment by name, such as quickstart, or its file; --config.KEY=VALUE after it changes a value"
    config_flags.DEFINE_config_file(
        "config", None, summary, flag_values=values, lock_config=True, sys_argv=["glm-jax", *arguments]
    )
    flags.DEFINE_multi_string(ENTRY, [], "a key of an entry that the file may lack", flag_values=values)


def with_entries(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments, with keys of data.sources and data.instructions turned into values of `--entry`.

    ml_collections knows only the keys of the experiment's file, but `--config.data.sources.NAME.path=...` may add a
    source.
    """
    found, waiting = list[str](), iter(arguments)
    for argument in waiting:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if argument.startswith(tuple(f"--config.data.{table}." for table in TABLES)) and key.count(".") == 3:
            found.append(f"--{ENTRY}={key}={value if equals else next(waiting, '')}")
        else:
            found.append(argument)
    return found


def entry_values(values: flags.FlagValues) -> dict[str, object]:
    """Return the keys of data.sources and data.instructions that the flags set, by dotted key.

    Raises:
        UserError: no entry has such a key, or a value has another type.
    """
    changes: dict[str, object] = {}
    for text in values[ENTRY].value or ():
        key, _, value = text.partition("=")
        _, table, name, _ = key.split(".")
        known = default_values({table: [name]})
        if key not in known:
            raise UserError(f"unknown config key {key}: {closest(key, list(known))}")
        default = known[key]
        try:
            changes[key] = type(default)(value) if isinstance(default, int | float) else value
        except ValueError:
            raise UserError(f"{key} is {value!r}, it must be a number such as {default!r}") from None
    return changes


def define_workdir(values: flags.FlagValues) -> None:
    """Add `--workdir`."""
    flags.DEFINE_string("workdir", None, "the folder that holds everything a run makes", flag_values=values)


def parse(values: flags.FlagValues, arguments: Sequence[str], required: Sequence[str]) -> bool:
    """Parse a command's flags. If they ask for the help, print it and return False.

    Raises:
        UserError: anything is wrong with the flags.
    """
    if {"-h", "--help"} & set(arguments):
        for name in values:
            if name not in ("h", ENTRY):
                default = values[name].default
                shown = "" if default is None or default is False else f" (default: {default})"
                print(f"  --{name:14} {values[name].help}{shown}")
        return False
    try:
        rest = values(["glm-jax", *arguments])
    except flags.Error as error:
        key = error.flagname if isinstance(error, flags.UnrecognizedFlagError) else ""
        if key in default_values({}):
            raise UserError(f"unknown flag --{key}: keys of the config are written --config.{key}=VALUE") from error
        raise UserError(_one_line(error)) from error
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(arguments, error)) from error
    except (OSError, SyntaxError, ImportError, TypeError, ValueError, NameError) as error:
        raise UserError(f"the experiment cannot be loaded: {_one_line(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]}: flags are written --name=value")
    require(values, required)
    return True


def require(values: flags.FlagValues, names: Sequence[str]) -> None:
    """Check that all required flags are given.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        if values[name].value in (None, ""):
            raise UserError(f"--{name} is missing: {values[name].help}")


def load(values: flags.FlagValues) -> Experiment:
    """Return the resolved config that the flags describe."""
    try:
        config, changes = values.config.to_dict(), entry_values(values)
        for key, value in changes.items():
            section, table, name, one = key.split(".")
            config.setdefault(section, {}).setdefault(table, {}).setdefault(name, {})[one] = value
        return resolve(config)
    except OSError as error:  # config_flags does not raise it before
        name = config_flags.get_config_filename(values["config"])
        known = [found for found, _ in summaries()]
        raise UserError(f"--config {name} cannot be read: {closest(name, known, 'config list')}") from error


def _one_line(error: Exception) -> str:
    """Return the last line of an error's message, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _unknown_key(arguments: Sequence[str], error: Exception) -> str:
    """Return a message that names the `--config.KEY` that does not exist, and the nearest that does."""
    known = list(default_values({}))
    for argument in arguments:
        key = argument.split("=")[0].removeprefix("--config.")
        if not argument.startswith("--config."):
            continue
        if key not in known:
            return f"unknown config key {key}: {closest(key, known)}"
    return f"unknown config key: {_one_line(error)}"
