"""Tasks of lm-eval on made-up records: one of each type of request, and its own tasks with only their data replaced."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # read when lm-eval imports them

DOCUMENTS = 60
NOUNS = ["array", "house", "river", "shape", "axis", "window", "garden", "letter", "number", "winter"]
ADJECTIVES = ["new", "old", "small", "long", "quiet", "empty", "round", "cold"]
VERBS = ["returns", "holds", "changes", "begins", "follows", "leaves"]

Record = Mapping[str, Any]


class Writer:
    """Draws made-up sentences."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def noun(self) -> str:
        return self.random.choice(NOUNS)

    def nouns(self, count: int) -> list[str]:
        return self.random.sample(NOUNS, count)

    def clause(self) -> str:
        adjective, verb = self.random.choice(ADJECTIVES), self.random.choice(VERBS)
        return f"the {adjective} {self.noun()} {verb} the {self.noun()}"

    def index(self, count: int) -> int:
        return self.random.randrange(count)


def arc(writer: Writer, number: int) -> Record:
    return {"id": str(number), "question": f"What {writer.clause()}?", "answerKey": "ABCD"[writer.index(4)],
            "choices": {"text": writer.nouns(4), "label": [*"ABCD"]}}  # fmt: skip


def hellaswag(writer: Writer, number: int) -> Record:
    return {"ind": number, "activity_label": "Building", "ctx_a": f"{writer.clause()}.", "ctx_b": "then it",
            "ctx": "", "endings": [f"{verb} the {writer.noun()}." for verb in VERBS[:4]],
            "label": str(writer.index(4))}  # fmt: skip


def piqa(writer: Writer, number: int) -> Record:
    return {"goal": f"move the {writer.noun()}", "sol1": writer.clause(), "sol2": writer.clause(),
            "label": writer.index(2)}  # fmt: skip


def winogrande(writer: Writer, number: int) -> Record:
    first, second = writer.nouns(2)
    return {"sentence": f"the {first} is by the {second} as the _ is old.", "option1": first, "option2": second,
            "answer": str(1 + writer.index(2))}  # fmt: skip


def boolq(writer: Writer, number: int) -> Record:
    return {"passage": f"{writer.clause()}.", "question": f"is it that {writer.clause()}", "label": writer.index(2),
            "idx": number}  # fmt: skip


def copa(writer: Writer, number: int) -> Record:
    return {"premise": f"{writer.clause()}.", "choice1": f"{writer.clause()}.", "choice2": f"{writer.clause()}.",
            "question": ("cause", "effect")[writer.index(2)], "label": writer.index(2), "idx": number}  # fmt: skip


def lambada(writer: Writer, number: int) -> Record:
    return {"text": f"{writer.clause()} and {writer.clause()}"}


def wikitext(writer: Writer, number: int) -> Record:
    return {"page": " = Title = \n " + " . ".join(writer.clause() for _ in range(1 + number % 12))}


def gsm8k(writer: Writer, number: int) -> Record:
    one, other = writer.index(90), writer.index(9)
    return {"question": f"{one} axes and {other} axes: how many?", "answer": f"{one}+{other}\n#### {one + other}"}


def triviaqa(writer: Writer, number: int) -> Record:
    noun = writer.noun()
    return {"question_id": str(number), "question": f"What {writer.clause()}",
            "answer": {"value": noun, "aliases": [noun, noun.title()]}}  # fmt: skip


# its own tasks: their definition below lm_eval/tasks, and the split that is evaluated
OWN: Mapping[str, tuple[str, str, Callable[[Writer, int], Record]]] = {
    "arc_easy": ("arc/arc_easy.yaml", "test", arc),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", hellaswag),
    "piqa": ("piqa/piqa.yaml", "validation", piqa),
    "winogrande": ("winogrande/default.yaml", "validation", winogrande),
    "boolq": ("super_glue/boolq/default.yaml", "validation", boolq),
    "copa": ("super_glue/copa/default.yaml", "validation", copa),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", lambada),
    "wikitext": ("wikitext/wikitext.yaml", "test", wikitext),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test", gsm8k),
    "triviaqa": ("triviaqa/default.yaml", "validation", triviaqa),
}


def jsonl(path: Path, records: Sequence[Record]) -> Path:
    """Write records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def source(folder: Path, files: Mapping[str, Path]) -> dict[str, object]:
    """Return what a task says about its data: the file of each split, and where they are cached."""
    return {"data_files": {split: str(file) for split, file in files.items()}, "cache_dir": str(folder / "cache")}


def task(folder: Path, name: str, records: Sequence[Record], **fields: object) -> Path:
    """Write a task on records, and its file."""
    data = jsonl(folder / "data" / f"{name}.jsonl", records)
    whole = {"task": name, "dataset_path": "json", "dataset_kwargs": source(folder, {"test": data}),
             "test_split": "test", **fields}  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML
    return file


def own(folder: Path, names: Sequence[str] = tuple(OWN)) -> list[str]:
    """Write its own tasks with other data, and return their names: `local_` and the task's."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    for seed, name in enumerate(names):
        definition, split, make = OWN[name]
        writer = Writer(seed)
        data = {part: jsonl(folder / "data" / f"{name}.{part}.jsonl", [make(writer, n) for n in range(DOCUMENTS)])
                for part in ("train", split)}  # fmt: skip
        replaced = {"include": str(Path(spec.origin).parent / "tasks" / definition), "task": f"local_{name}",
                    "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source(folder, data),
                    "training_split": "train", "validation_split": None, "test_split": split}  # fmt: skip
        (folder / f"local_{name}.yaml").write_text(json.dumps(replaced), encoding="utf-8")
    return [f"local_{name}" for name in names]
