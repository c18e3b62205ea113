"""What commands import: a mistake is told before jax is loaded, and no command loads what it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "scipy", "datasketch", "tensorstore", "tensorboardX", "matplotlib",
         "lm_eval", "datasets"}  # fmt: skip

MISTAKES = """
import json, sys
from glm_jax.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    found.append([code, sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(found))
"""
IMPORTS = "import json, sys, {}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"


def loaded(program: str, *arguments: str) -> list:
    """Run a program in a process of its own; return what it prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def test_no_mistake_waits_for_jax(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    run, text = f"--workdir={tmp_path / 'run'}", tmp_path / "text"
    quickstart = ["--config=quickstart", f"--config.data.cache={tmp_path / 'cache'}"]
    mistakes = [
        ["train"],
        ["train", *quickstart, run, "--config.seed=-1"],
        ["train", *quickstart, f"--workdir={text}"],
        ["train", *quickstart, run, f"--config.data.sources.en.path={tmp_path / 'nowhere'}"],
        ["train", *quickstart, run, f"--replay={tmp_path / 'nowhere'}"],
        ["generate", "--prompt=a"],
        ["generate", run, "--prompt=a"],
        ["generate", run, "--prompt=a", "--top_p=7"],
        ["evaluate", run, "--tasks=x"],
        ["evaluate", run, "--tasks=x", "--harness", f"--include={tmp_path / 'nowhere'}"],
        ["compare", str(tmp_path), str(tmp_path)],
        ["convert", "sat-to-orbax", f"--path={tmp_path / 'nowhere'}", f"--out={tmp_path / 'out'}"],
        ["convert", "quantize", f"--path={tmp_path}", f"--out={text}", "--bits=8"],
        ["corpus", "build", *quickstart, f"--config.data.sources.en.path={tmp_path / 'nowhere'}"],
        ["corpus", "inspect", "--config=nowhere"],
        ["config", "show", "--config=quickstart", "--config.x=1"],
        ["schedule", "--stages=0"],
        ["report", run],
        ["sweep", "--config=quickstart", run],
    ]
    for arguments, (code, modules) in zip(mistakes, loaded(MISTAKES, json.dumps(mistakes)), strict=True):
        assert code == 2, arguments
        assert not HEAVY & set(modules), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) in (["text"], ["cache", "text"])


@pytest.mark.parametrize(
    "module, without",
    [
        ("glm_jax", HEAVY | {"numpy"}),
        ("glm_jax.inference", {"orbax", "optax", "grain", "scipy", "datasketch", "tensorboardX", "matplotlib"}),
        ("glm_jax.interop.convert", {"orbax", "optax", "grain", "scipy", "datasketch", "tensorboardX", "matplotlib"}),
        ("glm_jax.training.run", {"scipy", "datasketch", "tensorboardX", "matplotlib"}),
        ("glm_jax.data.corpora.prepare", HEAVY),
    ],
)
def test_a_room_imports_what_it_needs(module: str, without: set[str]) -> None:
    assert not without & set(loaded(IMPORTS.format(module)))
