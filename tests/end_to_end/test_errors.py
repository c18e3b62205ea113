"""A user's mistakes: one line that says what is wrong and how to fix it, exit code 2, nothing half-written."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a command was refused in one line, and return the line."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.model.num_layer=4", "did you mean model.num_layers?"),
        ("--config.data.sources.en.langage=de", "did you mean data.sources.en.language?"),
        ("--config.model.num_layers=four", "four"),
        ("--config.model.num_layers=0", "model.num_layers is 0"),
        ("--config.model.norm=batch", "deepnorm, post, pre, sandwich"),
        ("--optimizer.peak_lr=1", "keys of the config are written --config.optimizer.peak_lr=VALUE"),
        ("--config.model.num_heads=5", "model.hidden_size 32 is not divisible by num_heads 5"),
        ("--config.mesh.tensor=2", "JAX_NUM_CPU_DEVICES=2"),
        ("--config.train.microbatches=3", "train.microbatches 3"),
        ("--config.data.sources.en.path=/nowhere/en.txt", "/nowhere/en.txt"),
        ("--config.model.hidden_size=30", "rotary positions need it to be even"),
        ("--config.model.vocab_size=64", "less than the tokenizer's"),
        ("--config.seed=-1", "seed is -1"),
        ("--config.mesh.data=0", "mesh.data is 0"),
        ("--confg=x", "config"),
        ("stray", "unexpected argument stray"),
    ],
)
def test_a_wrong_flag(experiment: Path, glm_jax: Cli, tmp_path: Path, flag: str, said: str) -> None:
    line = refused(glm_jax("train", "--config", experiment, "--workdir", tmp_path / "run", flag))
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, said",
    [
        ("--config.mesh.tensor=4", "mesh.tensor=4 does not divide model.num_heads (2): 2 would"),
        ("--config.mesh.data=3", "mesh.data=3 does not divide"),
        ("--config.mesh.pipeline=4", "at most 3"),
    ],
)
def test_a_mesh_that_does_not_divide(experiment: Path, glm_jax: Cli, tmp_path: Path, flag: str, said: str) -> None:
    line = refused(glm_jax("train", "--config", experiment, "--workdir", tmp_path / "run", flag, devices=4))
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, said", [(b"", "empty"), (b"\n \n\n", "empty"), (b"good text\n\nbad \xff\xfe text\n", "UTF-8")]
)
def test_a_bad_corpus(experiment: Path, glm_jax: Cli, tmp_path: Path, content: bytes, said: str) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    flag = f"--config.data.sources.en.path={corpus}"
    line = refused(glm_jax("train", "--config", experiment, "--workdir", tmp_path / "run", flag))
    assert said in line and str(corpus) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_of_another_model(experiment: Path, glm_jax: Cli, tmp_path: Path) -> None:
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run", "--config.train.steps=1",
                 "--config.train.eval_every=0"]  # fmt: skip
    assert glm_jax(*arguments).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for key, value in (("model.num_layers", 4), ("seed", 7), ("data.seq_length", 32), ("data.tokenizer.vocab_size", 9)):
        line = refused(glm_jax(*arguments, f"--config.{key}={value}"))
        assert key in line and "--workdir" in line
    record = tmp_path / "run" / "interventions.jsonl"
    record.write_text("garbage\n")
    assert "line 1, is damaged" in refused(glm_jax(*arguments, "--config.train.keep=9"))
    record.unlink()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_missing_flags_files_and_commands(glm_jax: Cli, experiment: Path, tmp_path: Path) -> None:
    assert "did you mean train?" in refused(glm_jax("trian"))
    assert "--workdir is missing" in refused(glm_jax("train", "--config", experiment))
    assert "--config is missing" in refused(glm_jax("train", "--workdir", tmp_path / "run"))
    assert "nowhere.py" in refused(glm_jax("train", "--config", "nowhere.py", "--workdir", tmp_path / "run"))
    assert "not the workdir of a run" in refused(glm_jax("generate", "--workdir", tmp_path, "--prompt", "[MASK]"))


@pytest.mark.slow
def test_a_planned_change_that_will_not_fit_the_mesh_is_refused_at_the_start(
    experiment: Path, glm_jax: Cli, tmp_path: Path
) -> None:
    planned = "--config.interventions=((9,{'train.global_batch':6}),)"  # 2 microbatches of 3 rows
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run", "--config.mesh.data=2", planned]
    assert "mesh.data=2 does not divide rows of a microbatch" in refused(glm_jax(*arguments, devices=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workdirs_that_cannot_be_used(glm_jax: Cli, experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for workdir, said in (
        (tmp_path / "file" / "sub", "is a file"),
        ("x" * 300, "too long"),
        ("", "--workdir is empty"),
    ):
        line = refused(glm_jax("train", "--config", experiment, "--workdir", workdir))
        assert said in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, said",
    [
        ('{"seed": 12', "config.json is damaged"),
        ("[]", "config.json is damaged"),
        ('{"sead": 12}', "config.json does not fit this version: unknown config key sead"),
    ],
)
def test_a_damaged_config_in_the_workdir(
    glm_jax: Cli, experiment: Path, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    for arguments in (["train", "--config", experiment], ["generate", "--prompt", "[MASK]"]):
        assert said in refused(glm_jax(*arguments, "--workdir", tmp_path))
