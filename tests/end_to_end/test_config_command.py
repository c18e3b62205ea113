"""`glm-jax config` shows every value and its origin, without jax."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    assert sum(line.startswith("experiments/quickstart.py ") for line in done.stdout.splitlines()) == 1


def test_config_and_help_do_not_import_jax(experiment: Path) -> None:
    for arguments in (["--help"], ["config", "show", "--config", str(experiment)], ["train", "--help"]):
        code = f"import sys; from glm_jax.cli import main; assert main({arguments!r}) == 0 and 'jax' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
