"""Flags: a value is a value whatever it looks like, and a wrong flag is one line that names the right one."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from absl import flags

from glm_jax.cli import common, main

COMMANDS = [
    "train",
    "generate",
    "evaluate",
    "compare",
    "convert sat-to-orbax",
    "convert orbax-to-sat",
    "convert quantize",
    "corpus fetch",
    "corpus build",
    "corpus inspect",
    "config show",
    "plan",
    "schedule",
    "report",
    "sweep",
]
SECRET = "--prompt=what a file of flags would say\n--workdir=/nowhere\n"


class Parsed(Exception):
    """Ends a command once its flags are parsed, and brings their values."""


def parsed(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> flags.FlagValues:
    """Return the flags of a command."""
    real = common.parse

    def parse(values: flags.FlagValues, given: list[str], required: list[str], nameless: Sequence[str] = ()) -> bool:
        del required
        real(values, given, [], nameless)
        raise Parsed(values)

    with monkeypatch.context() as patched, pytest.raises(Parsed) as caught:
        patched.setattr(common, "parse", parse)
        main.main([*command.split(), *arguments])
    return caught.value.args[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Check that a command is refused in one line, and return it."""
    assert main.main(list(arguments)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n")
    return errors


def test_every_command_is_in_the_list() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(main.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_text_is_taken_literally(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flags").write_text(SECRET)
    values = parsed(monkeypatch, command)
    names = [name for name in values if values[name].parser.flag_type() == "string" and name != common.OVERRIDE]
    assert names or command == "schedule"
    shapes = (f"--flagfile={tmp_path}/flags", "--flagfile", "--undefok=x", "--workdir=x", "--config.seed=3", "--help",
              "-h", "--", "-", "a=b\nc", "--noconfig.seed", "")  # fmt: skip
    for name in names:
        for text in shapes:
            for arguments in ([f"--{name}={text}"], [f"--{name}", text], [f"-{name}", text]):
                assert parsed(monkeypatch, command, *arguments)[name].value in (
                    text,
                    [text],
                )  # a list if it may come again


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_a_file_of_flags(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flags").write_text(SECRET)
    for flag in ("--flagfile", "-flagfile"):
        for arguments in ([f"{flag}={tmp_path}/flags"], [flag, f"{tmp_path}/flags"]):
            assert "unknown flag --flagfile" in refused(capsys, *command.split(), *arguments)


def test_a_value_of_the_config_is_taken_literally(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("--flagfile=x", "--config=y", "--help", "a=b", "--config.seed=3"):
        for arguments in ([f"--config.train.wandb={text}"], ["--config.train.wandb", text]):
            assert main.main(["config", "show", "--config=quickstart", *arguments]) == 0
            shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.wandb ")]
            assert shown[0].split() == ["train.wandb", repr(text), "--config.train.wandb"]


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_are_of_this_machine(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    values = parsed(monkeypatch, command)
    for name in ("workdir", "path", "out", "svg", "replay", "input", "output"):
        if name in values:
            for url in ("gs://bucket/x", "s3://b", "http://x.org/a", "file:///tmp/x", "HTTPS://x"):
                assert f"--{name}={url}: it must name a file or folder of this machine" in refused(
                    capsys, *command.split(), f"--{name}={url}"
                )
            assert parsed(monkeypatch, command, f"--{name}=~/x")[name].value == "/home/somebody/x"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("train --lr=1", "written --config.optimizer.peak_lr=VALUE"),
        ("train --batch_size 4", "written --config.train.global_batch=VALUE"),
        ("sweep --batch-size=4", "written --config.train.global_batch=VALUE"),
        ("train --num_layers=4", "written --config.model.num_layers=VALUE"),
        ("train --optimizer.peak_lr=1", "written --config.optimizer.peak_lr=VALUE"),
        ("train --confg=x", "did you mean --config?"),
        ("generate --temprature=1", "did you mean --temperature?"),
        ("generate --config.seed=1", "this command has no --config"),
        ("generate --prompt=x", "--workdir is missing"),
        ("generate --workdir=x --prompt=", "--prompt is empty"),
        ("generate --workdir= --prompt=x", "--workdir is empty"),
        ("generate --prompt", "--prompt has no value"),
        ("generate --temperature=nan", "--temperature=nan: it must be a finite number"),
        ("generate --temperature=inf", "--temperature=inf: it must be a finite number"),
        ("generate --temperature=1e999", "--temperature=inf: it must be a finite number"),
        ("generate --top_p=nan", "--top_p=nan: it must be a finite number"),
        (f"generate --max_tokens={2**70}", "it must be at most 2**63 - 1"),
        (f"schedule --stages={10**40}", "it must be at most 2**63 - 1"),
        (f"schedule --stages={'9' * 5000}", "--stages"),
        ("schedule --nostages", "--nostages"),
        ("sweep --nodry-run=5", "--nodry-run"),
        ("train --config=norms --workdir=x", "did you mean ablations/norms?"),
        ("train --config=ablation/norms --workdir=x", "did you mean ablations/norms?"),
        ("train --config=gs://bucket/x.py --workdir=x", "there is no experiment gs://bucket/x.py"),
        ("train --config= --workdir=x", "--config is empty"),
        ("schedule -- --stages=3", "unexpected argument --stages=3"),
        ("help nothing", "unknown command nothing"),
    ],
)
def test_a_wrong_flag_is_one_line_that_helps(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments.split())


@pytest.mark.parametrize(
    "arguments, shown",
    [
        ("--version", "glm-jax "),
        ("help", "usage: glm-jax"),
        ("help train", "--workdir"),
        ("help convert", "usage: glm-jax convert"),
        ("help config show", "--specs"),
    ],
)
def test_help_and_version(arguments: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(arguments.split()) == 0
    assert shown in capsys.readouterr().out
