"""Training and evaluation on answers: rows decoded by the tokenizer, losses against a count over the records."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.config import Experiment, default_config, instructions, resolve, with_changes
from glm_jax.config.data import OBJECTIVES
from glm_jax.data.corpora.prepare import Prepared, prepare
from glm_jax.data.rows.experiment import heldout_answers, training_batches
from glm_jax.data.rows.rows import Rows
from glm_jax.data.tokenizers import sentencepiece
from glm_jax.engine.heldout import HeldOut
from glm_jax.errors import UserError
from glm_jax.parallel import mesh

CHATS, SUMS = 60, 80
ONE_DEVICE: dict[str, int] = dict.fromkeys(mesh.AXES, 1)


def chat(number: int) -> list[tuple[str, str]]:
    """Return the three samples of a chat."""
    answers = [f"It is {number}.", f"Then {number + 1}, I would say", f"Bye, number {number}!"]
    first = f"user: Say {number}.\n\nassistant:"
    second = f"{first} {answers[0]}\n\nuser: And now?\n\nassistant:"
    third = f"{second} {answers[1]}\n\nuser: Good bye.\n\nassistant:"
    return list(zip((first, second, third), answers, strict=True))


def turns(number: int) -> list[dict[str, str]]:
    questions = (f"Say {number}.", "And now?", "Good bye.")
    pairs = zip(questions, (answer for _, answer in chat(number)), strict=True)
    said = [part for pair in pairs for part in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in said]


SAMPLES = {
    "chats": [sample for number in range(CHATS) for sample in chat(number)],
    "sums": [(f"{number}+1=", str(number + 1)) for number in range(SUMS)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Return a config of two sets and no text, with a tokenizer from a file."""
    folder = tmp_path_factory.mktemp("answers")
    records = [json.dumps({"messages": turns(number)}) for number in range(CHATS)]
    (folder / "chats.jsonl").write_text("\n".join(records))
    records = [json.dumps({"question": text, "answer": answer}) for text, answer in SAMPLES["sums"]]
    (folder / "sums.jsonl").write_text("\n".join(records))
    texts = [f"{text} {answer}" for samples in SAMPLES.values() for text, answer in samples]
    (folder / "t.model").write_bytes(sentencepiece.train(texts * 3, 400))
    (folder / "text.txt").write_text("\n\n".join(f"{text} {number}" for number, text in enumerate(texts)))
    config = default_config()
    config.data.cache = str(folder / "cache")
    config.data.tokenizer.path = str(folder / "t.model")
    config.data.instructions = {name: instructions(path=str(folder / f"{name}.jsonl")) for name in SAMPLES}
    config.data.heldout = 0.2
    config.data.seq_length = 128
    config.data.near_duplicates = 0.0
    config.data.blanks.update({"mask": 0.0, "gmask": 0.0, "instruction": 1.0, "instruction_segments": 1})
    config.train.update(global_batch=8, microbatches=2, eval_rows=1000)
    return resolve(config)


def texts_of(batch: Rows[np.ndarray], tokenizer: Any) -> list[tuple[str, str]]:
    """Return prompt and answer of each sample of a batch, decoded from the places outside and inside the loss."""
    found = []
    for b in range(len(batch.tokens)):
        for segment in range(1, batch.segments[b].max() + 1):
            here = batch.segments[b] == segment
            asked = batch.tokens[b, here & (batch.loss_mask[b] == 0)].tolist()
            told = batch.targets[b, here & (batch.loss_mask[b] == 1)].tolist()
            assert asked.pop() == tokenizer.mask and told.pop() == tokenizer.eop  # all else is text
            found.append((tokenizer.decode(asked), tokenizer.decode(told)))
    return found


def sides_of(config: Experiment, prepared: Prepared) -> dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Return all samples of each set to train on and held out, read from rows."""
    batches = training_batches(config, prepared)
    rows = batches.at(0, 400)  # over an epoch of either
    found = {}
    for name, held in heldout_answers(config, prepared).items():
        mine = rows.take(np.flatnonzero(rows.source == batches.sources.index(name)))
        found[name] = (
            sorted(set(texts_of(mine, prepared.tokenizer))),
            texts_of(held.at(0, held.rows_per_epoch), prepared.tokenizer),
        )
    return found


@pytest.mark.parametrize("blanks", [{}, {"whole_documents": True}])
def test_rows_hold_every_answer_and_the_loss_nothing_else(base: Experiment, blanks: dict[str, Any]) -> None:
    config = with_changes(base, {f"data.blanks.{key}": value for key, value in blanks.items()})
    prepared = prepare(config, lambda line: None)
    found = sides_of(config, prepared)
    assert list(found) == ["chats", "sums"]
    for name, (train, held) in found.items():
        assert sorted([*train, *held]) == sorted(SAMPLES[name]) and held
    held = {text for text, _ in found["chats"][1]}
    whole = [{text for text, _ in chat(number)} for number in range(CHATS)]
    assert all(own <= held or not own & held for own in whole)
    batch = training_batches(config, prepared).at(0, 60)
    assert (batch.objective == OBJECTIVES.index("instruction")).all()
    assert bool(blanks) == (batch.segments.max() > 1)  # several short samples share a row
    shares = {"data.blanks.mask": 0.5, "data.blanks.smask": 0.5, "data.temperature": 2.0}
    other = training_batches(with_changes(config, shares), prepared).at(0, 60)
    assert (other.tokens == batch.tokens).all()  # where there is no text, answers have all rows


def test_a_sample_has_its_part_of_the_row(base: Experiment) -> None:
    config = with_changes(base, {"data.blanks.instruction_segments": 3})
    prepared = prepare(config, lambda line: None)
    encode, cut = prepared.tokenizer.encode, prepared.instructions["chats"].cut
    sizes = [len(encode(text)) + len(encode(answer)) + 2 for text, answer in SAMPLES["chats"]]
    assert cut == sum(size > 128 // 3 for size in sizes) > sum(size > 128 // 2 for size in sizes)
    short = [sample for sample, size in zip(SAMPLES["chats"], sizes, strict=True) if size <= 128 // 3]
    for text, answer in sides_of(config, prepared)["chats"][0]:
        (whole,) = [asked for asked, told in SAMPLES["chats"] if told == answer and asked.endswith(text)]
        assert (text == whole) == ((whole, answer) in short)


def nats(token: int) -> float:
    return 1 + token % 64 / 64  # exact in float32


def evaluate(config: Experiment, prepared: Prepared) -> dict[str, float]:
    def losses(_: Any, batch: Rows[Any]) -> np.ndarray:
        targets, mask = np.asarray(batch.targets), np.asarray(batch.loss_mask)  # [1, B, S]
        return ((1 + targets % 64 / 64) * mask).astype(np.float32)

    return HeldOut(config, prepared, mesh.build(ONE_DEVICE)).losses(losses, None)


def test_the_loss_of_held_out_answers_is_that_of_the_records(base: Experiment) -> None:
    prepared = prepare(base, lambda line: None)
    tokenizer, event = prepared.tokenizer, evaluate(base, prepared)
    expected: dict[str, float] = {}
    total, count = 0.0, 0
    for name, (_, held) in sides_of(base, prepared).items():
        targets = [int(token) for _, answer in held for token in [*tokenizer.encode(answer), tokenizer.eop]]
        size = sum(len(answer.encode()) for _, answer in held)
        own = sum(map(nats, targets))
        expected[f"loss/{name}"] = own / len(targets)
        expected[f"bits_per_byte/{name}"] = own / math.log(2) / size
        total, count = total + own, count + len(targets)
    assert event == pytest.approx(expected | {"loss": total / count}, rel=1e-12)
    fewer = evaluate(with_changes(base, {"train.eval_rows": 3}), prepared)
    first = heldout_answers(base, prepared)["sums"].at(0, 3)
    assert fewer["loss/sums"] == pytest.approx(np.mean([nats(int(t)) for t in first.targets[first.loss_mask == 1]]))
    assert evaluate(with_changes(base, {"seed": 5, "data.seed": 6}), prepared) == event  # always the same rows


@pytest.mark.parametrize("given", [True, False])
def test_text_may_serve_the_tokenizer_and_the_evaluation_alone(base: Experiment, given: bool) -> None:
    folder = Path(base.data.tokenizer.path).parent
    changes: dict[str, Any] = {} if given else {"data.tokenizer.path": "", "data.tokenizer.vocab_size": 400}
    config = with_changes(base, changes | {"data.sources.en.path": str(folder / "text.txt")})
    prepared = prepare(config, lambda line: None)
    batches = training_batches(config, prepared)
    assert batches.sources == ("chats", "sums")
    assert (batches.at(0, 200).objective == OBJECTIVES.index("instruction")).all()
    event, names = evaluate(config, prepared), ("en", "chats", "sums")
    assert set(event) == {"loss"} | {f"{kind}/{name}" for kind in ("loss", "bits_per_byte") for name in names}
    assert event["loss"] == event["loss/en"]  # of the sources alone, whatever the sets are
    usual = with_changes(config, {"data.blanks.mask": 0.3, "data.blanks.gmask": 0.7, "data.blanks.instruction": 0.0})
    assert event["loss/en"] == evaluate(usual, prepared)["loss/en"]


def test_nothing_is_held_out_if_nothing_is_asked_for(base: Experiment) -> None:
    config = with_changes(base, {"data.heldout": 0.0})
    prepared = prepare(config, lambda line: None)
    assert evaluate(config, prepared) == {}
    assert {name: len(sides.train) for name, sides in prepared.instructions.items()} == {
        name: len(samples) for name, samples in SAMPLES.items()
    }


def test_a_run_without_text_says_what_it_lacks(base: Experiment) -> None:
    nothing = dataclasses.replace(base, data=dataclasses.replace(base.data, instructions={}))
    for config, message in (
        (nothing, "data.sources is empty: name at least one corpus"),
        (with_changes(base, {"data.tokenizer.path": ""}), "need a tokenizer: set data.tokenizer.path"),
        (
            with_changes(base, {"data.blanks.instruction": 0.0, "data.blanks.mask": 1.0}),
            "no share: set data.blanks.instruction=1",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(config, print)
