"""Hold prompts, answers and scores of BIG-bench's tasks against its own code, on the 24 tasks of BIG-bench-lite.

    pip download bigbench==1.0.0 --no-deps && tar xzf bigbench-1.0.0.tar.gz
    python -m tests.proofs.bigbench_reference bigbench-1.0.0 /tmp/reference

takes EXAMPLES of each task file. Log-probabilities of choices are drawn, and answers are made of targets. It is seen
that every prompt without examples is the same text, that those with three are made of BIG-bench's own examples, that
the same part of each answer counts, and that the scores are the same. Tasks that BIG-bench scores by ROUGE have none.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from glm_jax.evaluation import bigbench, measures, run
from glm_jax.evaluation.few_shot import Shots
from glm_jax.inference import Model
from tests.evaluation import toy
from tests.evaluation.test_bigbench import ANSWERS, STOPS_AND_PATTERNS
from tests.proofs.bigbench_lite import prepare

EXAMPLES, SHOTS, ROOM = 40, 3, 1 << 17
OTHERS = ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1", "tensorflow.compat.v2", "datasets", "t5",
          "t5.evaluation", "sklearn", "sklearn.metrics", "bigbench.benchmark_tasks")  # fmt: skip
METRICS = ("multiple_choice_grade", "exact_str_match")
MISSING = {"canary": "", "name": "x", "description": "", "keywords": []}


def said_of(text: str, targets: Sequence[str]) -> str:
    """Return what a model says to a prompt: a target or something around it, always the same for a prompt."""
    number = sum(text.encode())
    target = targets[number % len(targets)]
    return (target, f" {target}", f"{target}. Yes", f"{target}\nQ: ", f"no {target}")[number // 7 % 5]


class Drawn:
    """A model for BIG-bench's code, whose answers are those that `hold` gives to ours."""

    def __init__(self, utils: Any, targets: Mapping[str, Sequence[str]]) -> None:  # a module without types
        self._utils, self._targets = utils, targets

    def cond_log_prob(self, inputs: Sequence[str], targets: Sequence[Sequence[str]], **_: object) -> list[list[float]]:
        return [drawn(text, len(choices)) for text, choices in zip(inputs, targets, strict=True)]

    def generate_text(self, inputs: Sequence[str], stop_string: str | None, output_regex: str | None) -> list[str]:
        texts = [said_of(text, self._targets[text]) for text in inputs]
        return self._utils.postprocess_output(texts, None, stop_string, output_regex)


def drawn(text: str, count: int) -> list[float]:
    return np.random.default_rng(list(text.encode())).normal(size=count).tolist()


def composed(text: str, separator: str, examples: Collection[str], count: int) -> bool:
    """Whether a text is `count` of the examples, each with a separator behind it."""
    if count == 0:
        return text == ""
    return any(
        composed(text.removeprefix(one + separator), separator, examples, count - 1)
        for one in examples
        if text.startswith(one + separator)
    )


def hold(json_task: Any, utils: Any, model: Model, folder: Path, file: Path) -> float:
    """Hold a task file against BIG-bench's code, and return the score; nan if it is no score of ours."""
    content = {**MISSING, **json.loads(file.read_text(encoding="utf-8"))}
    content["metrics"] = [name for name in content["metrics"] if name in METRICS]  # ROUGE needs t5
    (folder / "task.yaml").write_text(
        f"name: x\ntype: mul\nmodule: BIGBench\npath: {file.parent.name}\nfile_pattern: task.json\n"
        f"max_seq_length: {ROOM}\n"
    )
    places, data = [folder / "task.yaml"], file.parent.parent
    plain, few = (
        run.plan(model.decoder, toy.Bytes(), places, data, Shots(count)).parts[0].work for count in (0, SHOTS)
    )
    assert isinstance(plain, bigbench.Graded | bigbench.Matched) and isinstance(few, bigbench.Graded | bigbench.Matched)
    task = json_task.JsonTask(json.loads(json.dumps(content)))
    prefix, separator = task.task_prefix, task.few_shot_example_separator
    theirs = {prefix + one["input"]: one for one in task._ds}
    items = plain.asked
    assert [item.text for item in items] == [prefix + one["input"] for one in task._ds], file
    shown = {one["input"] + target for one in task._ds for target in one["target"]}
    for item, before in zip(few.asked, items, strict=True):
        question = before.text.removeprefix(prefix)
        examples = item.text.removeprefix(prefix).removesuffix(question)
        assert item.text == prefix + examples + question and composed(examples, separator, shown, SHOTS), item.place
    targets = {text: one["target"] for text, one in theirs.items()}
    found = task.evaluate_fixed_shot(Drawn(utils, targets), 0)
    results = [
        {"log_probabilities": drawn(item.text, len(item.choices))} if item.choices
        else {"answers": [toy.Bytes().encode(said_of(item.text, targets[item.text])).tolist()]} for item in items
    ]  # fmt: skip
    ours = measures.estimate("BIG-bench", plain.columns(results)["BIG-bench"], resamples=0).value
    metric = METRICS[isinstance(plain, bigbench.Matched)]
    if task.preferred_score != metric:
        return math.nan
    score = 100 * (found[metric] - task.low_score) / (task.high_score - task.low_score)
    assert math.isclose(ours, score, rel_tol=1e-9, abs_tol=1e-9), (file, ours, score)
    return ours


def main(package: Path, folder: Path) -> None:
    """Hold all tasks, and the answers of the tests."""
    sys.path.insert(0, str(package))
    sys.modules.update({name: mock.MagicMock() for name in OTHERS})  # what is only needed for other scores
    json_task, utils = (
        importlib.import_module(f"bigbench.{name}") for name in ("api.json_task", "models.model_utils")
    )  # fmt: skip
    for answer, expected in ANSWERS.items():
        assert expected == [
            utils.postprocess_output(answer, None, stop, pattern) for stop, pattern in STOPS_AND_PATTERNS
        ]
    prepare(package / "bigbench/benchmark_tasks", folder, EXAMPLES)
    model, count = toy.model(length=ROOM), 0
    for file in sorted(folder.rglob("task.json")):
        score = hold(json_task, utils, model, folder, file)
        count += 1
        print(f"{re.sub('/task.json$', '', str(file.relative_to(folder)))}\t{score:.3f}")
    print(f"{count} task files, the same prompts and answers; nan: scored by ROUGE there")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
