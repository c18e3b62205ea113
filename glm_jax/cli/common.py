"""What the commands share: their flags, and the messages for flags that are wrong."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from glm_jax.cli import experiments, overrides, streams
from glm_jax.config import Experiment, files, resolve
from glm_jax.config.fields import closest, path_problem
from glm_jax.errors import UserError

CONFIG = "config"
OVERRIDE = "override"  # the flag of `--config.KEY=VALUE`, written as KEY=VALUE
HIDDEN = ("h", OVERRIDE)  # flags that the help does not show
LARGEST = 2**63 - 1  # of a flag


def say(line: str) -> None:
    """Print a message to standard error; standard output holds only results."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # such as a full disk: nobody can be told
        streams.drop(sys.stderr)


def flag_values(command: str, example: str) -> flags.FlagValues:
    """Return a new set of flags with nothing but `--help`, which shows an example of arguments; commands share none."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    shown = f"show the flags of {command}; an example: glm-jax {command} {example}"
    flags.DEFINE_bool("help", False, shown, short_name="h", flag_values=values)
    return values


def define_config(values: flags.FlagValues) -> None:
    """Add `--config`, and `--config.KEY=VALUE`."""
    summary = "an experiment by name, such as quickstart, or its file; --config.KEY=VALUE changes a value"
    flags.DEFINE_string(CONFIG, None, summary, flag_values=values)
    flags.DEFINE_multi_string(OVERRIDE, [], "a changed value of the config", flag_values=values)


class _PathParser(flags.ArgumentParser[str]):
    """Take the name of a file or folder, and expand ~ in it."""

    def parse(self, argument: str) -> str:
        if problem := path_problem(argument):
            raise ValueError(f"it must {problem}")
        return os.path.expanduser(argument)


def define_path(values: flags.FlagValues, name: str, summary: str) -> None:
    """Add a flag that names a file or a folder."""
    flags.DEFINE(_PathParser(), name, None, summary, values, flags.ArgumentSerializer[str]())


def define_workdir(values: flags.FlagValues) -> None:
    """Add `--workdir`."""
    define_path(values, "workdir", "the folder that holds everything a run makes")


def define_processes(values: flags.FlagValues) -> None:
    """Add `--coordinator`, `--processes` and `--process`."""
    together = "for several processes without a scheduler:"
    flags.DEFINE_string("coordinator", None, f"{together} HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, f"{together} how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "process", None, f"{together} the number of this one, from 0", lower_bound=0, flag_values=values
    )


def parse(
    values: flags.FlagValues, arguments: Sequence[str], required: Sequence[str], nameless: Sequence[str] = ()
) -> bool:
    """Parse a command's flags. If they ask for the help, print it and return False.

    Args:
        values: the flags.
        arguments: of the command.
        required: flags that must be given.
        nameless: flags that arguments without a name are for, one after the other, or all for one of several values.

    Raises:
        UserError: anything is wrong with the flags.
    """
    joined = _joined(values, arguments)
    if {"-h", "--help"} & set(joined):
        for name in values:
            if name not in HIDDEN:
                default = values[name].default
                shown = "" if default is None or default is False else f" (default: {default})"
                summary = " ".join(str(values[name].help).split())  # absl adds lines to a flag of several values
                print(f"  --{name:18} {summary}{shown}")
        return False
    try:
        rest = values(["glm-jax", *joined])
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(values, error.flagname)) from error
    except (flags.Error, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    free = [name for name in nameless if values[name].value is None or isinstance(values[name].value, list)]
    for argument in rest[1:]:
        if not free:
            raise UserError(f"unexpected argument {argument}: flags are written --name=value")
        flag = values[free[0]]
        try:
            flag.parse(argument)
        except flags.Error as error:
            raise UserError(" ".join(str(error).split())) from error
        if not isinstance(flag.value, list):
            free.pop(0)
    for name in values:
        _check_number(name, values[name].value)
    require(values, required)
    return True


def _joined(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """Return the arguments with each flag and its value in one, as `--name=value`.

    absl would read a value that stands alone as a flag if it looks like one, and --flagfile=FILE among all arguments as
    the content of a file.
    """
    found, waiting = list[str](), iter(arguments)
    for argument in waiting:
        if argument == "--":
            return [*found, argument, *waiting]
        flag = re.fullmatch(r"--?([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if flag is None:
            found.append(argument)
            continue
        name, value = flag[1], flag[2]
        if OVERRIDE in values and (key := re.fullmatch(r"(no)?config\.(.*)", name, re.DOTALL)):
            if value is None and overrides.is_switch(key[2]):
                value = "false" if key[1] else "true"
            name, prefix = OVERRIDE, f"{key[2]}="
        else:
            prefix = ""
        if name in values and not values[name].boolean:
            if value is None and (value := next(waiting, None)) is None:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            found.append(f"--{name}={prefix}{value}")
        elif name in ("flagfile", "undefok"):  # absl's own, which no command has
            raise UserError(_unknown_flag(values, name))
        else:
            found.append(argument)
    return found


def _unknown_flag(values: flags.FlagValues, name: str) -> str:
    """Return the message for a flag that does not exist: the key that may be meant, or the nearest flag."""
    known = [each for each in values if each not in HIDDEN]
    if name.startswith(f"{CONFIG}.") and CONFIG not in values:
        return f"unknown flag --{name}: this command has no --config"
    if CONFIG in values and (key := overrides.known_key(name)):
        return f"unknown flag --{name}: keys of the config are written --config.{key}=VALUE"
    hint = closest(name, known, "COMMAND --help").replace("did you mean ", "did you mean --")
    return f"unknown flag --{name}: {hint}"


def _check_number(name: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value}: it must be a finite number")
    if isinstance(value, int) and value > LARGEST:
        raise UserError(f"--{name}={str(value)[:40]}: it must be at most 2**63 - 1")


def require(values: flags.FlagValues, names: Sequence[str]) -> None:
    """Check that all required flags are given.

    Raises:
        UserError: one is missing or empty.
    """
    for name in names:
        if values[name].value is None:
            raise UserError(f"--{name} is missing: {values[name].help}")
        if not values[name].value:
            raise UserError(f"--{name} is empty: {values[name].help}")


def changes(values: flags.FlagValues) -> dict[str, object]:
    """Return the values of `--config.KEY=VALUE` by dotted key.

    Raises:
        UserError: a key does not exist, or a value has another type.
    """
    pairs = (text.partition("=") for text in values.override)
    return {key: overrides.parse(key, value) for key, _, value in pairs}


def experiment_file(values: flags.FlagValues) -> Path:
    """Return the file that `--config` names.

    Raises:
        UserError: there is none.
    """
    return experiments.find(values.config)


def load(values: flags.FlagValues) -> Experiment:
    """Return the resolved config that the flags describe.

    Raises:
        UserError: the experiment's file fails, or a key or value is not valid.
    """
    return resolve(files.config(experiment_file(values)), changes(values))
