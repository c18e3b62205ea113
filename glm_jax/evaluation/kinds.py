"""Which protocol reads the files of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.evaluation import bigbench
from glm_jax.evaluation.bias import CrowsPairs, StereoSet
from glm_jax.evaluation.few_shot import NONE, Shots
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.texts import Pile, Texts
from glm_jax.evaluation.work import Asked, Choices, Cloze, Generated, Lambada, Work
from glm_jax.inference.batch import Decoder

KINDS: Mapping[str, Callable[[Decoder, Tokenizer, Task, Path], Work]] = {
    "mul": Choices,
    "gen": Generated,
    "lm": Texts,
    "MMLU": Choices,
    "Cloze": Cloze,
    "CrowsPairTask": CrowsPairs,
    "StereoSetTask": StereoSet,
    "LAMBADA": Lambada,
    "Pile": Pile,
    "BIGBench": bigbench.open_task,
}


def open_work(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    file: Path,
    shots: Shots = NONE,
    examples: Path | None = None,
) -> Work:
    """Read a data file of a task.

    Args:
        decoder, tokenizer: of the model.
        task: says which protocol reads the file.
        file: to read.
        shots: examples before each question, in the protocols whose items have a right answer.
        examples: the file to draw them from, read like the data file; None is the data file itself.

    Raises:
        UserError: a file cannot be read, a line is wrong or has no room in the model's rows, or there are not enough
            examples.
    """
    read = KINDS[task.module or task.kind]
    work = read(decoder, tokenizer, task, file)
    if shots.count and isinstance(work, Asked) and work.answered:
        source = work if examples is None else read(decoder, tokenizer, task, examples)
        assert isinstance(source, Asked)  # the same protocol reads it
        work.precede(source.answered, shots)
    return work
