"""Which weights lie at a path: it is recognised by its files, which are not read, and jax is not imported.

WORKDIR, WORKDIR@STEP, WORKDIR/checkpoints/STEP     what a run or `convert` wrote
a folder with `params`, or with numbered such       checkpoints of orbax without the rest of a workdir
a folder with `latest`                              an official checkpoint, written by SwissArmyTransformer (SAT)
a folder with config.json and *.safetensors or *.bin   what Hugging Face's classes of the original GLM write
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from glm_jax.config.fields import local_path
from glm_jax.errors import UserError
from glm_jax.workdir import checkpoint_folders, folder
from glm_jax.workdir.checkpoint_format import PARAMS

Kind = Literal["workdir", "orbax", "sat", "huggingface"]

CONFIG = "config.json"  # of a Hugging Face folder
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for, as transformers does
FILES = (CONFIG, *WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))  # by which a folder is known


class Place(NamedTuple):
    """Where weights lie."""

    kind: Kind
    root: Path  # the workdir, or the folder that the user named
    step: Path | None = None  # the folder of the step: of a workdir, the one that the path names


def find(path: str | Path) -> Place:
    """Recognise what lies at a path.

    Raises:
        UserError: the path is a URL, there are no weights that can be read, or not the step that it names.
    """
    root, step = split(local_path(path, "the path of the weights"))
    if (root / "latest").is_file():
        return Place("sat", root)
    if (checkpoints := root / "checkpoints").is_dir():
        steps = checkpoint_folders.folders(checkpoints)
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{root} has no checkpoint of step {step}, but these: {listed}")
        return Place("workdir", root, None if step is None else checkpoints / str(step))
    if (found := _find_step(root)) is not None:
        return Place("orbax", root, found)
    if any((root / name).is_file() for name in FILES):
        return Place("huggingface", root)
    missing = "does not exist" if not root.exists() else "holds no weights"
    raise UserError(f"{root} {missing}: name a workdir with checkpoints, a checkpoint's folder with {PARAMS!r} in it, "
                    "or an official one with `latest`")  # fmt: skip


def split(path: Path) -> tuple[Path, int | None]:
    """Return the folder that a path names, and the step if it names one in a workdir."""
    if not path.exists() and (match := re.fullmatch(r"(.+)@(\d+)", str(path))):
        return Path(match[1]), int(match[2])
    whole = path.absolute()
    if whole.parent.name == "checkpoints" and whole.name.isdecimal() and (whole.parents[1] / folder.CONFIG).is_file():
        return path.parent.parent, int(path.name)
    if whole.name == "checkpoints" and (whole.parent / folder.CONFIG).is_file():
        return path.parent, None
    return path, None


def _find_step(root: Path) -> Path | None:
    """Return `root` if it is the folder of a step, or that of the newest step in it."""
    if (root / PARAMS).is_dir():
        return root
    steps = [step for step in root.iterdir() if step.name.isdecimal()] if root.is_dir() else []
    return max((step for step in steps if (step / PARAMS).is_dir()), key=lambda step: int(step.name), default=None)
