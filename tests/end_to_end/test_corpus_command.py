"""`glm-jax corpus`: build once, train from the cache, count or refuse damage, show the contents."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def damaged(experiment: Path, tmp_path: Path) -> list[str | Path]:
    """Return flags for the tiny experiment, with a source of two files that have two damaged records."""
    lines = (experiment.parent / "zh.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join([*lines[:60], "{broken", *lines[60:]]), encoding="utf-8")
    (tmp_path / "texts" / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    flags = [f"--config.data.sources.zh.path={tmp_path / 'texts'}", f"--config.data.cache={tmp_path / 'cache'}"]
    return ["--config", experiment, *flags]


def times(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "runs"}


def test_build_then_train_and_inspect_from_the_cache(glm_jax: Cli, damaged: list[str | Path], tmp_path: Path) -> None:
    refused = glm_jax("corpus", "build", *damaged, "--strict", "--workers=2")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'texts' / 'a.jsonl'}, line 61: broken JSON")
    built = glm_jax("corpus", "build", *damaged, "--workers=2")
    assert built.returncode == 0, built.stderr
    assert "documents zh: left out 1 broken JSON, the first in " in built.stderr
    assert "documents zh: left out 1 invalid UTF-8, the first in " in built.stderr
    files = times(tmp_path / "cache")
    again = glm_jax("corpus", "build", *damaged)
    assert again.returncode == 0 and times(tmp_path / "cache") == files
    refused = glm_jax("corpus", "build", *damaged, "--strict")
    assert refused.returncode == 2 and "a.jsonl, line 61: broken JSON, left out of zh" in refused.stderr
    steps = ["--config.train.steps=1", "--config.train.eval_every=0"]
    trained = glm_jax("train", *damaged, "--workdir", tmp_path / "run", *steps)
    assert trained.returncode == 0, trained.stderr
    said = [line for line in trained.stderr.splitlines() if line.startswith(("documents", "tokenizer", "shards"))]
    assert len([line for line in said if line.endswith("(cached)")]) == 5 == len(said) - 2
    shown = glm_jax("corpus", "inspect", *damaged, "--rows=4")
    assert shown.returncode == 0, shown.stderr
    assert "  skipped  1 broken JSON, the first in " in shown.stdout and "tokens a document" in shown.stdout
    assert "row 3: " in shown.stdout and "MASK: " in shown.stdout and "\x1b" not in shown.stdout
    index = json.loads(next((tmp_path / "cache" / "shards").glob("*/index.json")).read_text(encoding="utf-8"))
    for split, documents in index["documents"].items():
        assert f"  {split:8} {documents:,} documents, {index['tokens'][split]:,} tokens" in shown.stdout


def test_verify_names_damage_and_build_mends_it(glm_jax: Cli, experiment: Path, tmp_path: Path) -> None:
    flags = ["--config", experiment, f"--config.data.cache={tmp_path / 'cache'}"]
    assert glm_jax("corpus", "build", *flags).returncode == 0
    index = next((tmp_path / "cache" / "shards").glob("*/index.json"))
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])
    done = glm_jax("corpus", "verify", *flags)
    assert done.returncode == 2 and not done.stdout
    assert f"{index.parent} is damaged: index.json is cut short" in done.stderr.splitlines()
    assert done.stderr.splitlines()[-1].startswith("error: 1 of ") and "`glm-jax corpus build`" in done.stderr
    assert f"{index.parent} is damaged (index.json is cut short)" in glm_jax("corpus", "build", *flags).stderr
    assert index.read_bytes() == whole and glm_jax("corpus", "verify", *flags).returncode == 0


def test_train_alone_refuses_damage(glm_jax: Cli, damaged: list[str | Path], tmp_path: Path) -> None:
    done = glm_jax("train", *damaged, "--workdir", tmp_path / "run")
    assert done.returncode == 2 and "line 61: broken JSON" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_fetch_has_nothing_to_do(glm_jax: Cli, experiment: Path) -> None:
    done = glm_jax("corpus", "fetch", "--config", experiment)
    assert done.returncode == 2 and "nothing to fetch" in done.stderr


def test_usage(glm_jax: Cli) -> None:
    done = glm_jax("corpus", "bild")
    assert done.returncode == 2 and "fetch|build|inspect" in done.stderr
