"""Which protocol reads the files of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.evaluation import bigbench
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.work import Choices, CrowsPairs, Generated, Lambada, Pile, StereoSet, Texts, Work
from glm_jax.inference.batch import Decoder

KINDS: Mapping[str, Callable[[Decoder, Tokenizer, Task, Path], Work]] = {
    "mul": Choices,
    "gen": Generated,
    "lm": Texts,
    "MMLU": Choices,
    "CrowsPairTask": CrowsPairs,
    "StereoSetTask": StereoSet,
    "LAMBADA": Lambada,
    "Pile": Pile,
    "BIGBench": bigbench.open_task,
}


def open_work(decoder: Decoder, tokenizer: Tokenizer, task: Task, file: Path) -> Work:
    """Read a data file of a task.

    Raises:
        UserError: it cannot be read, or a line is wrong or has no room in the model's rows.
    """
    return KINDS[task.module or task.kind](decoder, tokenizer, task, file)
