"""Look for the texts of an evaluation's tasks in what a run was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from glm_jax import signals
from glm_jax.cli import progress
from glm_jax.data.corpora.prepare import prepare
from glm_jax.data.rows.streams import Documents
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation.contamination import Contamination, Search, scan
from glm_jax.evaluation.run import Plan
from glm_jax.parallel import processes
from glm_jax.workdir import folder
from glm_jax.workdir.checkpoint_folders import everyone


def documents(workdir: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[Documents]:
    """Return all that a run trains on, whether it has come to it yet or not; nothing in all processes but the first.

    Raises:
        UserError: the workdir names no training text, or that cannot be read any more.
    """
    found = list[Documents]()
    if processes.is_first():
        config = folder.read_config(workdir)
        if not config.data.sources and not config.data.instructions:
            raise UserError(
                f"{workdir} names no training text: leave out --contamination, or name the workdir of a run"
            )
        prepared = prepare(config, say, tokenizer=tokenizer)
        found = [*(sides["train"] for sides in prepared.shards.values()),
                 *(prepared.instructions[name].train for name in prepared.instruction_weights)]  # fmt: skip
    processes.wait_for_all()
    return found


def look(todo: Plan, sources: Sequence[Documents], tokenizer: Tokenizer) -> list[Contamination] | None:
    """Return what training text has of each part of a plan, or None after a signal. All processes must call."""
    search = Search(part.work.texts() for part in todo.parts)
    with signals.listening(stop := progress.Request()):
        total = sum(map(len, sources))
        with progress.Progress(total, 0, shown=processes.is_first(), what="training documents") as bar:
            for read, tokens in scan(search, sources, tokenizer):
                bar.add(read, tokens)
                if stop.made:
                    break
        return None if any(everyone("stop" if stop.made else "")) else search.counts()
