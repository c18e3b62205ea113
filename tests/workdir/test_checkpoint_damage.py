"""Any damage to a checkpoint on disk is noticed, named, and skipped for the newest good one."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine.bind import EngineConfig
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh
from glm_jax.storage import digests
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.state import StepConfig, TrainState, create_state, disk_targets, to_disk
from glm_jax.workdir import checkpoint_folders
from glm_jax.workdir.checkpoint_format import StoredArray, open_params
from glm_jax.workdir.checkpoints import Checkpoints
from tests.damage import flip
from tests.journal import Journal
from tests.patience import HANG

CONFIG = StepConfig(EngineConfig(GLMConfig(2, 8, 2, 8, 16, max_length=8), 16, 4), OptimizerConfig(), None, seed=3)
MESH = mesh.build(dict.fromkeys(mesh.AXES, 1))


@pytest.fixture(scope="module")
def state() -> TrainState:
    return create_state(CONFIG, MESH)


def save(workdir: Path, state: TrainState, *steps: int, keep: int = 3, keep_every: int = 0) -> Checkpoints:
    """Save the state under each step, with its params shifted by the step."""
    checkpoints = Checkpoints(workdir, keep, keep_every)
    for step in steps:
        params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
        moved = state._replace(step=jnp.int32(step), params=params)
        checkpoints.save(to_disk(CONFIG, MESH, moved), {"step": step, "samples": 8 * step, "note": ["a", None]})
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def saved(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("saved")
    assert save(workdir, state, 1, 2).steps() == [1, 2]
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a workdir with the checkpoints 1 and 2, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[Callable[[Path], None], str] = {
    flip: "differs from its digest",
    cut: "is cut short",
    Path.unlink: "is missing",
}


def kind(path: Path) -> str:
    """Return a file's kind: orbax names data files after their contents."""
    return "/".join("*" if len(part) == 32 else part for part in path.parts)


def test_every_kind_of_file_is_covered(workdir: Path) -> None:
    folder = workdir / "checkpoints/2"
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    tree = ["_METADATA", "_sharding", "array_metadatas/process_0", "d/*", "manifest.ocdbt", "ocdbt.process_0/d/*",
            "ocdbt.process_0/manifest.ocdbt"]  # fmt: skip
    assert {kind(name) for name in names} == {
        *("_CHECKPOINT_METADATA", "digests-0-of-1.json", "run/metadata"),
        *(f"{item}/{name}" for item in ("params", "training") for name in tree),
    }
    for name, (damage, words) in itertools.product(names, DAMAGES.items()):
        content = (folder / name).read_bytes()
        damage(folder / name)
        if name.name == "digests-0-of-1.json" and damage is Path.unlink:
            assert digests.damage(folder) == "was cut off while it was saved"
        else:
            assert digests.damage(folder) == f"{name} {words}"
        (folder / name).write_bytes(content)
    assert digests.damage(folder) is None


@pytest.mark.parametrize(
    "pattern, damage, words",
    [
        ("params/ocdbt.process_0/d/*", flip, "{} differs from its digest"),
        ("training/_METADATA", cut, "{} is cut short"),
        ("run/metadata", Path.unlink, "{} is missing"),
        ("digests-*.json", flip, "{} differs from its digest"),
        ("digests-*.json", Path.unlink, "it was cut off while it was saved"),
    ],
)
def test_the_newest_good_one_is_restored(
    workdir: Path, state: TrainState, pattern: str, damage: Callable[[Path], None], words: str
) -> None:
    folder, said = workdir / "checkpoints/2", []
    path = max(folder.glob(pattern), key=lambda path: path.stat().st_size)
    damage(path)
    checkpoints = Checkpoints(workdir, say=said.append)
    restored = checkpoints.restore(disk_targets(CONFIG, MESH))
    assert restored is not None and restored.run == {"step": 1, "samples": 8, "note": ["a", None]}
    assert restored.items["training"]["step"] == 1
    jax.tree.map(
        lambda leaf, start: np.testing.assert_array_equal(leaf, start + 1), restored.items["params"], state.params
    )
    assert said == ["checkpoint 2 is skipped: " + words.format(path.relative_to(folder))]
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2.damaged"] and checkpoints.steps() == [1]
    checkpoints.close()
    # the run continues and reaches the same step, which may be damaged again
    save(workdir, state, 2)
    flip(workdir / "checkpoints/2/params/_METADATA")
    assert Checkpoints(workdir).restore(disk_targets(CONFIG, MESH)) is not None
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2.damaged", "2.damaged.2"]


def keep_the_state() -> None:
    """Fail: a run that cannot go back still has its state."""
    raise AssertionError("the state was dropped before it was sure that another one can be read")


def test_if_none_is_good_all_stay_and_are_named(workdir: Path) -> None:
    flip(workdir / "checkpoints/1/run/metadata")
    (workdir / "checkpoints/2/params/_METADATA").unlink()
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        Checkpoints(workdir, say=said.append).restore(disk_targets(CONFIG, MESH), make_room=keep_the_state)
    assert str(caught.value) == (
        f"no checkpoint in {workdir}/checkpoints is good (2: params/_METADATA is missing; 1: run/metadata differs from "
        "its digest): restore one, or remove the folder to start over"
    )
    assert len(said) == 2 and sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]


def test_what_an_interrupted_save_leaves_is_skipped(workdir: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints/3")
    (workdir / "checkpoints/3/digests-0-of-1.json").unlink()
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-1"):
        shutil.copytree(workdir / "checkpoints/2/params", workdir / "checkpoints" / name / "params")
    said: list[str] = []
    checkpoints = Checkpoints(workdir, say=said.append)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2", "3"]
    assert checkpoints.steps() == [1, 2] and checkpoints.latest_step() == 2
    restored = checkpoints.restore(disk_targets(CONFIG, MESH))
    assert restored is not None and restored.run["step"] == 2
    assert said == ["checkpoint 3 is skipped: it was cut off while it was saved"]
    empty = Checkpoints(tmp_path / "empty")
    assert empty.restore(disk_targets(CONFIG, MESH)) is None and empty.latest_step() is None and empty.unsaved() is None
    assert not (tmp_path / "empty").exists()


def test_going_back_sets_the_newer_ones_aside(workdir: Path) -> None:
    checkpoints = Checkpoints(workdir)
    made: list[str] = []
    restored = checkpoints.restore(disk_targets(CONFIG, MESH), at_most=1, make_room=lambda: made.append("room"))
    assert made == ["room"]
    assert restored is not None and restored.run["step"] == 1
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2.left"]
    assert checkpoints.restore(disk_targets(CONFIG, MESH), at_most=0) is None and checkpoints.steps() == []


def test_params_are_read_past_damage_and_nothing_changes(workdir: Path, state: TrainState) -> None:
    said: list[str] = []

    def stored(workdir: Path) -> dict[tuple[str, ...], StoredArray]:
        directory = workdir / "checkpoints"
        step, _ = checkpoint_folders.newest_good(
            directory, checkpoint_folders.folders(directory), "params/", said.append
        )
        return open_params(directory / str(step))

    def word(params: dict[tuple[str, ...], StoredArray]) -> np.ndarray:
        array = params["embedding", "word"]
        return array.read(tuple(slice(0, size) for size in array.shape))

    (workdir / "checkpoints/2/training/_METADATA").unlink()  # which is not read for params
    params = stored(workdir)
    np.testing.assert_array_equal(word(params), state.params["embedding"]["word"] + 2)
    assert said == []
    flip(workdir / "checkpoints/2/params/manifest.ocdbt")
    params = stored(workdir)
    np.testing.assert_array_equal(word(params), state.params["embedding"]["word"] + 1)
    assert said == ["checkpoint 2 is skipped: params/manifest.ocdbt differs from its digest"]
    flip(workdir / "checkpoints/1/params/manifest.ocdbt")
    with pytest.raises(UserError, match="no checkpoint in .* is good"):
        stored(workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]


def test_the_newest_and_every_nth_are_kept(state: TrainState, tmp_path: Path) -> None:
    checkpoints = save(tmp_path, state, *range(1, 10), keep=2, keep_every=4)
    assert checkpoints.steps() == [4, 8, 9]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "8", "9"]
    events = checkpoints.events()
    assert [event["step"] for event in events] == list(range(1, 10)) and checkpoints.events() == []
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints/9").rglob("*") if path.is_file()]
    listed = (tmp_path / "checkpoints/9/digests-0-of-1.json").stat().st_size
    assert events[-1]["bytes"] == sum(sizes) - listed
    assert all(0 < event["blocked_seconds"] <= event["seconds"] for event in events)


def test_the_newest_never_replaces_the_last_that_is_known_to_be_healthy(state: TrainState, tmp_path: Path) -> None:
    assert save(tmp_path, state, 1, 2, 3, keep=1).steps() == [2, 3]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(monkeypatch)
    checkpoints = save(tmp_path, state, 1, 2, keep=2)
    names = {target.name: safe for _, target, safe in journal.renamed if target.parent == checkpoints.directory}
    assert names == {"1": True, "2": True} and journal.is_safe(checkpoints.directory)
    assert Checkpoints(tmp_path).restore(disk_targets(CONFIG, MESH), at_most=1) is not None
    assert journal.renamed[-1][1].name == "2.left" and journal.is_safe(checkpoints.directory)


def test_another_dtype_and_missing_training_state_are_named(workdir: Path, state: TrainState, tmp_path: Path) -> None:
    half = state._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params))
    with pytest.raises(UserError, match=r"does not fit this config: params/blocks/\S+ is bfloat16 \[.*wants float32"):
        save(tmp_path, half, 1).restore(disk_targets(CONFIG, MESH), make_room=keep_the_state)
    shutil.rmtree(workdir / "checkpoints/2/training")
    (workdir / "checkpoints/2/digests-0-of-1.json").unlink()
    digests.seal(workdir / "checkpoints/2", digests.files(workdir / "checkpoints/2"))
    with pytest.raises(UserError, match="2 holds params alone"):
        Checkpoints(workdir).restore(disk_targets(CONFIG, MESH))


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    script = Path(__file__).parent / "full_disk_cases.py"
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and not subprocess.run([*own_mounts, "true"], capture_output=True).returncode
    command = [*(own_mounts if allowed else []), sys.executable, "-W", "error", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    reason = told["reason"]  # "No space left on device", or "File too large" where no disk may be mounted
    assert told["said"] == [
        f"checkpoint {step} could not be saved ({reason}): the run continues, the newest is still that of step 1"
        for step in (2, 3)
    ]
    outcomes = [(event["step"], event.get("error")) for event in told["events"]]
    assert outcomes == [(1, None), (2, reason), (3, reason), (4, None)]
    assert told["unsaved"] == reason
    assert done.stderr == "", "orbax's own traceback helps nobody"


def test_a_workdir_that_is_removed_is_not_made_anew(state: TrainState, tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", say=told.append)
    shutil.rmtree(tmp_path / "run")
    checkpoints.save(to_disk(CONFIG, MESH, state), {"step": 1})
    checkpoints.close()
    assert checkpoints.unsaved() == "the workdir has been removed" and not (tmp_path / "run").exists()
    assert told == [
        "checkpoint 1 could not be saved (the workdir has been removed): the run continues, there is none yet"
    ]


@pytest.mark.parametrize("name", ["a [1] b", "训练 & a*b?c%41#d\ne{f}~"])
def test_a_workdir_may_have_any_name(name: str, state: TrainState, tmp_path: Path) -> None:
    save(tmp_path / name, state, 1)
    restored = Checkpoints(tmp_path / name).restore(disk_targets(CONFIG, MESH))
    assert restored is not None and restored.run["step"] == 1
    saved = jax.tree.map(lambda leaf: leaf + 1, state.params)
    same = jax.tree.map(lambda one, two: bool((one == two).all()), saved, restored.items["params"])
    assert all(jax.tree.leaves(same))
