"""Builds a task of a name: its task files and its data, in the cache of the run whose held-out text it asks about."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_jax.config import Experiment
from glm_jax.config.fields import closest
from glm_jax.data.corpora import corpus, prepare
from glm_jax.data.corpora.cache import Cache, Report, open_cache
from glm_jax.data.instructions import prompts
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.samples import Prompted
from glm_jax.errors import UserError
from glm_jax.evaluation.tasks import gaps, reviews
from glm_jax.evaluation.tasks.names import CLOZES, NAMES, SENTIMENT, UNIDIRECTIONAL, is_name
from glm_jax.storage.files import json_line
from glm_jax.types import Json

VERSION = 1  # raised when the same text gives other questions
SEED = 1234  # of the choice of questions: the same for every run
REVIEWS = "chinese-reviews"

Files = dict[str, list[Json]]  # the records of each data file


class Recipe(NamedTuple):
    """How the data of a task are made."""

    identity: Sequence[str]  # of what they are made from
    gmask: bool
    make: Callable[[], Files]


def build(name: str, config: Experiment, report: Report) -> Path:
    """Return the task file of a name, made in the cache unless it is there.

    Args:
        name: see `names.is_name`.
        config: of the run: its `data` says what text it has held out.
        report: called with a line for each thing done.

    Raises:
        UserError: the run holds out too little text of the kind, or it cannot be read.
    """
    base = name.removesuffix(UNIDIRECTIONAL)
    cache = open_cache(config.data.cache, report)
    recipe = _reviews(config, cache) if base == SENTIMENT else _cloze(base, config, cache)
    identity = json.dumps([VERSION, base, *recipe.identity, str(cache.root.absolute())])
    key = f"{base}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    data = cache.root.absolute() / "tasks" / key

    def make(building: Path) -> None:
        files = recipe.make()
        few = min(map(len, files.values()))
        if few < gaps.LEAST:
            raise UserError(f"{base} finds {few} questions in what the run of this config holds out, it needs at least "
                            f"{gaps.LEAST}: train with a larger data.heldout, or leave the task out")  # fmt: skip
        for file, records in files.items():
            (building / f"{file}.jsonl").write_text("".join(map(json_line, records)), encoding="utf-8")
        for variant in ("", UNIDIRECTIONAL):
            content = _task_file(f"{base}{variant}", data, recipe.gmask, causal=bool(variant))
            (building / f"{base}{variant}.yaml").write_text(content, encoding="utf-8")

    directory, _ = cache.made("tasks", key, make)
    return directory / f"{name}.yaml"


def places(asked: Sequence[str], config: Callable[[], Experiment], report: Report) -> Iterator[str | UserError]:
    """Yield a place for each that is asked for: the task file of a name, and what is a file or a folder as it is.

    Args:
        asked: task files, folders of them, and names.
        config: returns the config of the run, if a name asks for it.
        report: called with a line for each thing done.
    """
    for one in asked:
        if Path(one).exists():
            yield one
        elif not is_name(one):
            yield UserError(f"--tasks {one} is neither a task file nor a folder of them, nor the name of a task: "
                            f"{closest(one, [*NAMES], 'evaluate --help')}")  # fmt: skip
        else:
            try:
                yield str(build(one, config(), report))
            except UserError as error:
                yield error


def _task_file(name: str, data: Path, gmask: bool, *, causal: bool) -> str:
    fields = {"name": name, "type": "mul", "module": "Cloze", "path": str(data), "file_pattern": "*.jsonl",
              "use_task_mask": gmask, "causal_context": causal}  # fmt: skip
    return "".join(f"{field}: {json.dumps(value)}\n" for field, value in fields.items())  # JSON is YAML


def _cloze(base: str, config: Experiment, cache: Cache) -> Recipe:
    cloze = CLOZES[base]
    stages = prepare.documents_of(cloze.language, config.data, cache)
    if not stages:
        raise UserError(f"{base} asks about held-out text, and no source of the run has language={cloze.language}")

    def make() -> Files:
        texts = (text for stage in stages for text in corpus.read_documents(stage, "heldout"))
        found = [gap for text in texts for gap in cloze.find(text)]
        blank = "" if cloze.gmask else "[MASK]"  # [gMASK] is added at the end
        return {"questions": gaps.questions(found, blank, cloze.choices, random.Random(SEED))}

    return Recipe([stage.name for stage in stages], cloze.gmask, make)


def _reviews(config: Experiment, cache: Cache) -> Recipe:
    """Return the recipe of `sentiment_zh`: reviews that a run of this config, if it trains on them, holds out."""
    file, share = instruction_samples.fetch(REVIEWS, cache), config.data.heldout

    def make() -> Files:
        asked = prompts.prompted([file], [], 0)
        found = [(place.digest, answer) for place, answer in asked if isinstance(answer, tuple)]
        held = corpus.split(np.array([digest for digest, _ in found], np.uint64), share)
        kept: list[Prompted] = [answer for (_, answer), side in zip(found, held, strict=True) if side]
        return reviews.questions(kept, random.Random(SEED))

    return Recipe([file.parent.name, str(share)], False, make)
