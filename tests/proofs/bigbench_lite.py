"""The 24 tasks of BIG-bench-lite on a workdir: that they are read and run, and the mean of their scores.

    pip download bigbench==1.0.0 --no-deps && tar xzf bigbench-1.0.0.tar.gz
    python -m tests.proofs.bigbench_lite bigbench-1.0.0/bigbench/benchmark_tasks WORKDIR /tmp/lite [EXAMPLES [SHOTS]]

draws EXAMPLES (200) of each task file, as some have tens of thousands. The score of a task is the mean of its
files', and that of BIG-bench-lite the mean of its tasks' (0 is chance, 100 the best). conlang_translation is scored by
exact matches, where BIG-bench takes ROUGE.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

from glm_jax.cli import main

TASKS = [
    "auto_debugging", "bbq_lite_json", "code_line_description", "conceptual_combinations",
    "conlang_translation", "emoji_movie", "formal_fallacies_syllogisms_negation", "hindu_knowledge",
    "known_unknowns", "language_identification", "linguistics_puzzles", "logic_grid_puzzle",
    "logical_deduction", "misconceptions_russian", "novel_concepts", "operators",
    "parsinlu_reading_comprehension", "play_dialog_same_or_different", "repeat_copy_logic", "strange_stories",
    "strategyqa", "symbol_interpretation", "vitaminc_fact_verification", "winowhy",
]  # fmt: skip


def prepare(source: Path, folder: Path, examples: int) -> None:
    """Write some examples of each task, always the same, and a task file for each."""
    for name in TASKS:
        files = sorted(source.glob(f"{name}/*/task.json")) or [source / name / "task.json"]
        for file in files:
            said = json.loads(file.read_text(encoding="utf-8"))
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            drawn = random.Random(0).sample(said["examples"], min(examples, len(said["examples"])))
            copy.write_text(json.dumps({**said, "examples": drawn}), encoding="utf-8")
        task = f"name: {name}\ntype: mul\nmodule: BIGBench\npath: {name}\nfile_pattern: '**/task.json'\n"
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")


def run(source: Path, workdir: Path, folder: Path, examples: int, shots: int) -> None:
    """Evaluate, and print the mean."""
    prepare(source, folder / "tasks", examples)
    arguments = [f"--workdir={workdir}", f"--tasks={folder / 'tasks'}", f"--out={folder / 'out'}"]
    code = main.main(["evaluate", *arguments, f"--shots={shots}"])
    found = json.loads((folder / "out/results.json").read_text())
    scores = {task["name"]: task["groups"]["all"]["BIG-bench"]["mean"] for task in found["tasks"]}
    print(f"{len(scores)} of {len(TASKS)} tasks, exit code {code}: mean {statistics.mean(scores.values()):.2f}")


if __name__ == "__main__":
    source, workdir, folder = map(Path, sys.argv[1:4])
    examples, shots = (int(sys.argv[place]) if len(sys.argv) > place else usual for place, usual in ((4, 200), (5, 0)))
    run(source, workdir, folder, examples, shots)
