"""Records of prompts with answers in the shapes that data sets have: a pair of fields, or a chat.

A chat is written as `role: what was said`, its turns separated by blank lines. Each answer of the assistant is a
sample: the prompt is all turns before it and a last line `assistant:`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_jax.data.corpora import readers
from glm_jax.data.corpora.records import Damaged
from glm_jax.data.instructions.render import Prompt, Refused, prompt
from glm_jax.errors import UserError
from glm_jax.types import Json

RECORDS = ("jsonl", "jsonl.zst", "json", "parquet")  # forms of files, and how their names end
WHOLE = "record"  # the field that holds a record which is an array, as C3's are

# Fields of a prompt and its answer. A record is read by the first pair that it has, unless it is a chat.
PAIRS = (("text", "target"), ("prompt", "answer"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"), ("instruction", "output"))  # fmt: skip
INPUTS = {"instruction": "input"}  # the field that follows a prompt's after a blank line, if it has text

CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # the fields of a turn
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MOST_NAMED = 20  # fields of a record that a message names
MOST_TURNS = 1000  # of a chat: its prompts hold all turns before them, so they grow with the square


@dataclass(frozen=True)
class Place:
    """Where a record is: the line of a file, or the row.

    Attributes:
        digest: 64 bits, equal for records that say the same; 0 if the record is damaged.
    """

    file: Path
    line: int
    digest: int = 0

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


def read_records(files: Iterable[Path], form: str = "") -> Iterator[tuple[Place, Json | Refused]]:
    """Yield the records of files with their places, in order; a damaged one is Refused, an array is the field WHOLE.

    Args:
        form: as in config.data.instructions; empty tells it by each file's name.

    Raises:
        UserError: a file of no known form, or a missing package.
    """
    for file in files:
        known = form or next((form for form in RECORDS if file.name.endswith(f".{form}")), "")
        if not known:
            raise UserError(f"{file} is not a file of records ({', '.join(RECORDS)}): set the set's `format`")
        for located in readers.read_records(file, known):
            if isinstance(located, Damaged):
                yield Place(file, located.line), Refused(located.reason, located.message)
            else:
                line, record = located
                yield Place(file, line), {WHOLE: record} if isinstance(record, list) else record


@dataclass(frozen=True)
class Asked:
    """The prompts and answers of a record, of which it has at least one.

    Attributes:
        text: that of the last prompt; the others are its beginnings.
        answers: for each prompt, where it ends in `text`, and its answer.
    """

    text: str
    answers: tuple[tuple[int, str], ...]

    def __len__(self) -> int:
        return len(self.answers)

    def job(self, number: int, _: int) -> Prompt:
        """Return a prompt and its answer."""
        stop, target = self.answers[number]
        return self.text[:stop], target

    def said(self) -> str:
        """Return all that the record says, for its digest."""
        return f"{self.text}\0{self.answers[-1][1]}"


def read(record: Mapping[str, object]) -> Asked | Refused:
    """Return what a record asks, or why it cannot be trained on. A field that is null counts as missing."""
    for chat, (role, content) in CHATS.items():
        if record.get(chat) is not None:
            return _chat(record[chat], chat, role, content)
    for pair in PAIRS:
        if all(record.get(name) is not None for name in pair):
            return _pair(record, *pair)
    known = ", ".join(" and ".join(pair) for pair in PAIRS)
    has = f"it has {', '.join([*record][:MOST_NAMED])}" if record else "it is empty"
    return Refused("missing field", f"the record has neither messages nor {known} ({has}): add them or give templates")


def _pair(record: Mapping[str, object], asks: str, answers: str) -> Asked | Refused:
    text, more, target = record[asks], "", record[answers]
    if asks in INPUTS and record.get(INPUTS[asks]) is not None:
        more = record[INPUTS[asks]]
    if not isinstance(text, str) or not isinstance(more, str) or not isinstance(target, str):
        also = f" or {INPUTS[asks]}" if asks in INPUTS else ""
        return Refused("not text", f"{asks}{also} or {answers} is not text: make it text")
    text = f"{text}\n\n{more}" if more.strip() else text
    return _whole(text, [(len(text), target)])


def _chat(turns: object, name: str, role: str, content: str) -> Asked | Refused:
    if not isinstance(turns, list):
        return Refused("not a chat", f"{name} is not a list of turns: make it one")
    if len(turns) > MOST_TURNS:
        return Refused("too many turns", f"{name} has {len(turns):,} turns, over {MOST_TURNS:,}: split the chat")
    text = ""
    answers: list[tuple[int, str]] = []
    for number, turn in enumerate(turns, 1):
        fields: Mapping[str, object] = turn if isinstance(turn, Mapping) else {}
        who, said = fields.get(role), fields.get(content)
        speaker = ROLES.get(who) if isinstance(who, str) else None
        if speaker is None:
            return Refused("unknown role", f"turn {number} of {name} has no {role} of {', '.join(ROLES)}: fix it")
        if not isinstance(said, str):
            return Refused("not text", f"{content} of turn {number} of {name} is not text: fix it or drop the chat")
        if not said.strip():
            return Refused("empty turn", f"turn {number} of {name} is empty: fill or drop it")
        text += f"\n\n{speaker}:" if text else f"{speaker}:"
        if speaker == "assistant":
            answers.append((len(text), said.strip()))
        text += f" {said.strip()}"
    if not answers:
        return Refused("no answer", f"{name} has no turn of the assistant: add its answer, or drop the chat")
    return _whole(text[: answers[-1][0]], answers)


def _whole(text: str, answers: Sequence[tuple[int, str]]) -> Asked | Refused:
    checked = prompt(text, answers[-1][1])  # which hold all that the record says
    return checked if isinstance(checked, Refused) else Asked(text, tuple(answers))
