"""A folder of tasks and data in the form of the GLM-130B repository, in every variant of its schema; and a workdir."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from glm_jax.config.fields import to_dict
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
from glm_jax.interop import convert, sat
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig, init

TEXTS = [
    "the small array returns a new shape . it has two axes , and no more",
    "the old house stood by the river ; nobody had lived in it for years",
    "天下大势，分久必合，合久必分。",
]
CONFIG = GLMConfig(1, 24, 2, 32, 480, max_length=64)


def tokenizer() -> SentencePieceTokenizer:
    """Return the tokenizer of the workdir."""
    return SentencePieceTokenizer(train(TEXTS * 20, 420))


def workdir(folder: Path, seed: int = 0) -> Path:
    """Write a workdir with a fresh tiny model."""
    sat.save(folder / "official", CONFIG, init(CONFIG, jax.random.key(seed)), tensor_parallel=1, iteration=5)
    weights = open_weights(folder / "official", to_dict(CONFIG))
    convert.to_workdir(weights, folder / "run", convert.experiment(CONFIG), tokenizer())
    return folder / "run"


def jsonl(path: Path, records: Sequence[object]) -> None:
    """Write records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def task(folder: Path, name: str, text: str) -> None:
    """Write a task file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write(folder: Path) -> Path:
    """Write the tasks, with their data beside them, and return their folder."""
    tasks = folder / "tasks"
    words = ["array", "shape", "river", "house", "years", "axes"]
    encode = tokenizer().encode
    for prompt, frame in (("prompt_1", "the {} is [MASK] ."), ("prompt_2", "{} : what is it ?")):
        for split, count in (("val", 5), ("test", 3)):
            records = [
                {"inputs_pretokenized": frame.format(words[number]), "choices_pretokenized": ["new", "old", "two axes"],
                 "label": number % 3} for number in range(count)
            ]  # fmt: skip
            jsonl(tasks / "choices" / prompt / f"{split}.jsonl", records)
    task(tasks, "choices", "name: 'choices'  # kebab keys, groups, prompts\ntype: 'mul'\npath: 'choices'\n"
         "file-pattern:\n  validation: '**/val.jsonl'\n  test: \"**/test.jsonl\"\nmicro-batch-size: 30\n"
         "max-seq-length: 2048\n")  # fmt: skip
    tokens = [{"inputs": encode(TEXTS[0]).tolist() * 6, "choices": [[200], [300]], "label": number,
               "inputs_pretokenized": "shown", "choices_pretokenized": ["first", "second"]}
              for number in (0, 1)]  # fmt: skip
    jsonl(tasks / "tokens/all.json", tokens)
    task(tasks, "tokens", "name: tokens\ntype: mul\npath: tokens\nuse_task_mask: true\nmetrics: [Accuracy, F1_mul]\n")
    jsonl(tasks / "causal/a.jsonl", [{"inputs_pretokenized": "the small", "choices_pretokenized": ["array", "house"],
                                      "label": 0}])  # fmt: skip
    task(tasks, "causal", "name: causal\ntype: mul\npath: causal\nuse-task-mask: True\nunidirectional: True\n")
    answers = [{"inputs_pretokenized": f"the {word} [MASK]", "targets_pretokenized": [word, "two"]} for word in words]
    answers.append({"inputs": encode("a new").tolist(), "targets": [encode("shape").tolist()]})
    jsonl(tasks / "greedy/x.jsonl", answers)
    task(tasks, "greedy", "name: greedy\ntype: gen\npath: greedy\nmax_gen_length: 4\n")
    task(tasks, "beams", "name: beams\ntype: gen\npath: greedy\nsampling-strategy: BeamSearchStrategy\nnum-beams: 3\n"
         "length-penalty: 0.7\nno-repeat-ngram-size: 2\nmin-gen-length: 2\nmax-gen-length: 4\n"
         "use-task-mask: true\n")  # fmt: skip
    for name, more in (("LAMBADA", ""), ("LAMBADA-unidirectional", "unidirectional: true\n")):
        task(tasks / "lambada", name, f"name: {name}\ntype: gen\nmodule: tasks.lambada.task.LAMBADA\npath: lambada\n"
             "file-pattern: {test: '**/test.jsonl'}\nsampling_strategy: BeamSearchStrategy\nnum_beams: 16\n"
             f"max_gen_length: 5\nuse_task_mask: true\n{more}")  # fmt: skip
    lambada = [{"inputs_pretokenized": "the old house stood by the", "targets_pretokenized": ["river"]}]
    jsonl(tasks / "lambada/lambada/test.jsonl", lambada * 3)
    (tasks / "text").mkdir()
    (tasks / "text/wiki.test.tokens").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    for name, more in (("WikiText-2", ""), ("WikiText-2 left to right", "unidirectional: true\n")):
        task(tasks, name.replace(" ", "_"), f"name: {name}\ntype: lm\npath: text\nuse-task-mask: true\n"
             f"file-pattern:\n  test: '**/wiki.test.tokens'\ngeneration-length: 16\n{more}")  # fmt: skip
    pile = [{"text": encode(text).tolist() * 3, "text_pretokenized": text * 3, "meta": {"pile_set_name": name}}
            for name, text in zip(("ArXiv", "Github", "ArXiv"), TEXTS, strict=True)]  # fmt: skip
    pile.append({"text": [], "text_pretokenized": "", "meta": {"pile_set_name": "Books3"}})
    jsonl(tasks / "pile/test_tokenized.jsonl", pile)
    task(tasks, "pile", "name: Pile\ntype: lm\nmodule: tasks.language-modeling.pile.Pile\npath: pile\n"
         "generation_length: 1024\nuse_task_mask: true\nfile-pattern: {test: '**/test_tokenized.jsonl'}\n"
         )  # fmt: skip
    pairs = [{"inputs_pretokenized": "", "choices_pretokenized": [text], "label": 0, "pair_ID": number, "sent_ID": side,
              "bias_type": ("age", "gender")[number % 2]}
             for number in range(4) for side, text in enumerate(TEXTS[:2])]  # fmt: skip
    jsonl(tasks / "data/crows-pair-dataset.jsonl", pairs)
    task(tasks, "crows", "name: CROWS\ntype: mul\nmodule: tasks.ethnic.crows-pair.tasks.CrowsPairTask\npath: data\n"
         "file-pattern: {test: '**/crows-pair-dataset.jsonl'}\nmicro-batch-size: 1\n")  # fmt: skip
    stereo = [{"inputs_pretokenized": f"the {word} is", "choices_pretokenized": ["new", "old", "two axes"], "label": 0,
               "ID": word, "bias_type": "race", "goal_label": ["stereotype", "anti-stereotype", "unrelated"]}
              for word in words]  # fmt: skip
    jsonl(tasks / "data/stereoset-dataset.jsonl", stereo)
    task(tasks, "stereoset", "name: StereoSet\ntype: mul\nmodule: tasks.ethnic.stereoset.tasks.StereoSetTask\n"
         "path: data\nfile-pattern: {test: '**/stereoset-dataset.jsonl'}\nuse_task_mask: true\n")  # fmt: skip
    for group in ("stem", "humanities"):
        for subject in ("one", "two"):
            questions = [{"inputs_pretokenized": f"{word} Answer: (", "choices_pretokenized": ["a", "b"], "label": 1}
                         for word in words[: 2 + len(subject + group) % 3]]  # fmt: skip
            jsonl(tasks / "MMLU" / group / f"{subject}.json", questions)
    task(tasks, "mmlu", "name: MMLU\ntype: mul\nmodule: tasks.mmlu.task.MMLU\npath: MMLU\nfile-pattern:\n"
         "  stem: stem/*.json\n  humanities: humanities/*.json\n")  # fmt: skip
    return tasks
