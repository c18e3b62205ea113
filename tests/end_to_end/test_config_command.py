"""`glm-jax config` shows every value and its origin, without jax; a command whose output is not read ends silently."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_show_names_the_origin_of_every_value(glm_jax: Cli, experiment: Path) -> None:
    done = glm_jax("config", "show", "--config", experiment, "--config.seed=5", "--config.data.sources.zh.weight=2")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["seed"] == ["5", "--config.seed"]
    assert rows["model.num_layers"] == ["3", str(experiment)]
    assert rows["model.norm"] == ["'deepnorm'", "default"]
    assert rows["data.sources.zh.weight"] == ["2.0", "--config.data.sources.zh.weight"]
    assert rows["data.sources.zh.field"] == ["'text'", "default"]


def test_list_gives_each_experiment_a_line(glm_jax: Cli) -> None:
    done = glm_jax("config", "list")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("quickstart ") for line in done.stdout.splitlines()) == 1


def test_experiments_are_found_by_name_from_any_directory(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()  # a folder, such as a workdir, is no experiment
    names = ("quickstart", "quickstart.py", "experiments/quickstart.py", "ablations/norms", "quickstar")
    shown = [["config", "show", f"--config={names[0]}", "--config.seed=5"]]
    shown += [["config", "show", "--config", name] for name in names]
    code = f"from glm_jax.cli.main import main; print([main(each) for each in {[['config', 'list'], *shown]!r}])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 2]", done.stderr
    assert done.stderr.splitlines()[-1] == "error: there is no experiment quickstar: did you mean quickstart?"


def test_config_and_help_do_not_import_jax(experiment: Path) -> None:
    for arguments in (["--help"], ["config", "show", "--config", str(experiment)], ["train", "--help"]):
        code = f"import sys; from glm_jax.cli.main import main; assert main({arguments!r}) == 0; assert 'jax' not in "
        code += "sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_specs_show_the_state_of_glm_130b_on_its_mesh(glm_jax: Cli) -> None:
    done = glm_jax("config", "show", "--config", "experiments/glm_130b.py", "--specs")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("params/blocks/attention/output/kernel")]
    path, shape, rest = rows[0].split(maxsplit=2)
    assert shape == "(70+2)x96x128x12288"  # 8 stages of 9 layers
    assert rest.split(")")[0] == "P('pipeline', 'tensor', None, 'data'"
    assert rest.split()[-1] == f"{72 * 12288**2 * 4 // 768:,}"
    assert done.stdout.splitlines()[-1].startswith("2,070,442,012 bytes of state on each of 768 devices")


def test_schedule_draws_its_timeline(glm_jax: Cli, tmp_path: Path) -> None:
    done = glm_jax("schedule", "--stages", "2", "--microbatches", "3", "--svg", tmp_path / "drawn.svg")
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.splitlines()[0].split()) == "stage 0 F0 F1 . F2 B0 . B1 B2"
    assert "bubble 1/4 (25.0%)" in done.stdout
    assert (tmp_path / "drawn.svg").read_text().startswith("<svg ")


UNREAD = ("--help", "train --help", "corpus --help", "config list", "config show --config {}", "schedule", "no-command")


def test_output_that_nobody_reads_is_no_error(experiment: Path, environment: dict[str, str]) -> None:
    for buffered in ("", "1"):  # a closed pipe is noticed at the end, or at the first line
        reader, writer = os.pipe()
        os.close(reader)
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "glm_jax", *command.format(experiment).split()],
                env={**environment, "PYTHONUNBUFFERED": buffered},
                stdout=writer,
                stderr=writer if command == "no-command" else subprocess.PIPE,
                text=True,
            )
            for command in UNREAD
        ]
        os.close(writer)
        said = [process.communicate()[1] for process in started]
        assert said == [""] * (len(UNREAD) - 1) + [None]
        assert [process.returncode for process in started] == [141] * len(UNREAD)


def test_a_reader_of_one_line_gets_it_and_ends_the_command(environment: dict[str, str]) -> None:
    long = ["schedule", "--stages=64", "--microbatches=512"]  # more than a pipe holds
    buffered = {**environment, "PYTHONUNBUFFERED": ""}  # otherwise Python drops what the write of a line leaves over
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writer = subprocess.Popen([sys.executable, "-m", "glm_jax", *long], env=buffered, **pipes)
    reader = subprocess.run(
        ["sh", "-c", "read -r line; echo $line"], stdin=writer.stdout, capture_output=True, text=True
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()  # the other reader's end, which holds the pipe open
    assert (writer.stderr.read(), writer.wait()) == ("", 141)
    assert reader.stdout.startswith("stage 0 F0 F1 F2")
    writer.stderr.close()


def test_flags_may_add_a_source_and_help_has_defaults_choices_and_an_example(glm_jax: Cli, experiment: Path) -> None:
    mine = ["--config.data.sources.mine.path=x.txt", "--config.data.sources.mine.weight", "2"]
    shown = glm_jax("config", "show", "--config", experiment, *mine).stdout
    assert re.search(r"data\.sources\.mine\.path +'x\.txt' +--config\.data\.sources\.mine\.path", shown)
    assert re.search(r"data\.sources\.mine\.weight +2\.0 +--config", shown) and "data.sources.en.path" in shown
    for flags, told in (
        (["--config.data.sources.mine.weigt=2"], "did you mean data.sources.mine.weight?"),
        (["--config.data.sources.mine.weight=a"], "must be a number such as 1.0"),
        (["--config.data.sources.mine.weight=2"], "has neither path nor sample"),
        (["--config.data.sources.mine.path=x", "--config.data.sources.mine.weight=-7"], "data.sources.mine"),
    ):
        assert told in glm_jax("config", "show", "--config", experiment, *flags).stderr.splitlines()[-1]
    told = glm_jax("generate", "--help").stdout
    assert "<greedy|sample|beam>" in told and "(default: greedy)" in told and "0: all (default: 0)" in told
    assert "glm-jax generate --workdir runs/quickstart --prompt" in told and "--entry" not in told
