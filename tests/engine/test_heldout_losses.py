"""The numbers of an evaluation, against our own count over texts whose tokens tell where they come from."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.config import default_config, resolve, source
from glm_jax.data.rows.experiment import training_batches
from glm_jax.data.rows.rows import Rows
from glm_jax.engine.heldout import HeldOut
from glm_jax.parallel import mesh

ONE_DEVICE: dict[str, int] = dict.fromkeys(mesh.AXES, 1)
EOS, EOP = 1, 6
VOCABULARY = 9000
GOLDEN = 5.626069391634981  # the loss of `nats` over the rows below
# First id, and lengths of the documents. Each id occurs once, so it tells the document that it came from.
SPLITS = {
    ("large", "train"): (100, [40] * 20),
    ("large", "heldout"): (2000, [33, 9, 57, 61, 24, 45, 50, 38, 29]),  # 346 tokens
    ("little", "train"): (4000, [40] * 20),
    ("little", "heldout"): (6000, [30, 21, 5]),  # 56 tokens
    ("scant", "train"): (8000, [60]),
    ("scant", "heldout"): (8500, [9, 6]),  # 15 tokens, too few
}


class Documents:
    def __init__(self, first: int, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        starts = first + np.cumsum([0, *lengths])[:-1]
        self._documents = [
            np.append(np.arange(start, start + length - 1), EOS) for start, length in zip(starts, lengths, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._documents[index].astype(np.int32)

    def ids(self) -> set[int]:
        """Return the ids that occur only here."""
        return {int(token) for document in self._documents for token in document} - {EOS}


def bytes_of(token: int) -> int:
    return 0 if token < 10 else 1 + token % 7


def nats(token: int, place: int) -> float:
    """Return a loss that differs for every target and every place in the row; exact in float32."""
    return (token % 512) / 64 + place / 8


PREPARED: Any = SimpleNamespace(
    tokenizer=SimpleNamespace(
        pad=0, unk=9, eos=EOS, mask=2, gmask=3, smask=4, sop=5, eop=EOP, prefix=(), size=VOCABULARY,
        token_bytes=np.array([bytes_of(token) for token in range(VOCABULARY)], np.int32),
    ),
    shards={
        name: {split: Documents(*SPLITS[name, split]) for split in ("train", "heldout")}
        for name in ("large", "little", "scant")
    },
    weights=dict.fromkeys(("large", "little", "scant"), 1.0), instructions={}, instruction_weights={},
)  # fmt: skip


def build(eval_rows: int = 1000, rows: int = 4, **changes: Any) -> Any:
    """Return a config whose microbatches have `rows` rows; `data__seed=3` sets data.seed."""
    config = default_config()
    for name in PREPARED.shards:
        config.data.sources[name] = source(path="x.txt")
    config.data.seq_length = 32
    config.train.update(global_batch=3 * rows, microbatches=3, eval_rows=eval_rows)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return resolve(config)


def evaluate(config: Any) -> tuple[dict[str, Any], list[Rows[np.ndarray]]]:
    """Run an evaluation whose losses are `nats`; return its values and the batches it asked for."""
    batches: list[Rows[np.ndarray]] = []

    def losses(params: Any, batch: Rows[Any]) -> np.ndarray:
        assert params == "params"
        read = Rows(*(np.asarray(array)[0] for array in batch))
        batches.append(read)
        assert read.tokens.shape == (config.train.global_batch // config.train.microbatches, 32)
        made = np.zeros(read.tokens.shape, np.float32)  # [B, S]
        for row, place in zip(*np.nonzero(read.loss_mask), strict=True):
            made[row, place] = nats(int(read.targets[row, place]), int(place))
        return made[None]

    return HeldOut(config, PREPARED, mesh.build(ONE_DEVICE)).losses(losses, "params"), batches


def name_of(row: np.ndarray) -> str:
    """Return the source that a row's tokens are held out from; fail if one is not held out."""
    ids = {int(token) for token in row} - set(range(10))
    (name,) = [name for name, splits in PREPARED.shards.items() if ids <= splits["heldout"].ids()]
    return name


def count(batches: list[Rows[np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Sum nats, targets and bytes by source, one target at a time; also collect the filled `rows` and their `texts`."""
    sums: dict[str, dict[str, Any]] = {}
    for batch in batches:
        for tokens, targets, segments, mask in zip(
            *(array.tolist() for array in (batch.tokens, batch.targets, batch.segments, batch.loss_mask)), strict=True
        ):
            if not any(segments):
                assert not any(mask)
                continue
            name = name_of(np.array([*tokens, *targets]))
            mine = sums.setdefault(name, {"nats": 0.0, "targets": 0, "bytes": 0, "rows": 0, "texts": []})
            mine["rows"] += 1
            mine["texts"] += [token for token, masked in zip(tokens, mask, strict=True) if not masked and token >= 10]
            for place in range(len(targets)):
                if mask[place]:
                    mine["nats"] += nats(targets[place], place)
                    mine["targets"] += 1
                    mine["bytes"] += bytes_of(targets[place])
                    mine["texts"] += [targets[place]] if targets[place] >= 10 else []
    return sums


# Without eop the last target is never read, so the targets of a row are not the tokens it reads.
@pytest.mark.parametrize("blanks", [{}, {"mask": 1.0, "gmask": 0.0}, {"mask": 0.0, "gmask": 1.0, "gmask_eop": False}])
def test_losses_are_means_over_target_tokens_and_bits_are_per_byte_of_text(blanks: dict[str, Any]) -> None:
    event, batches = evaluate(build(**{f"data__blanks__{name}": share for name, share in blanks.items()}))
    sums = count(batches)
    assert list(sums) == ["large", "little"]  # not `scant`, which has fewer than 16 tokens
    expected: dict[str, float] = {}
    for name, mine in sums.items():
        expected[f"loss/{name}"] = mine["nats"] / mine["targets"]
        expected[f"bits_per_byte/{name}"] = mine["nats"] * 1.4426950408889634 / mine["bytes"]  # log2(e)
    expected["loss"] = sum(mine["nats"] for mine in sums.values()) / sum(mine["targets"] for mine in sums.values())
    assert event == pytest.approx(expected, rel=1e-12)
    means = [event["loss/large"], event["loss/little"]]
    assert abs(event["loss"] - sum(means) / 2) > 0.01  # targets weigh alike, not sources
    ends = sum(int((batch.targets == EOP).sum()) for batch in batches)
    assert (ends == 0) == (blanks.get("gmask_eop") is False)  # the run's own options
    for name, mine in sums.items():  # one pass: no text twice, and most of the text
        assert len(set(mine["texts"])) == len(mine["texts"])
        assert len(mine["texts"]) > 0.6 * sum(SPLITS[name, "heldout"][1])


def test_no_more_rows_than_asked_for_and_the_last_batch_may_be_part_empty() -> None:
    _, whole = evaluate(build(rows=1))
    most = count(whole)["large"]["rows"]
    assert most > 9
    for limit, rows, sizes in ((1, 4, [4]), (4, 4, [4]), (5, 4, [4, 4]), (7, 3, [3, 3, 3]), (9, 3, [3, 3, 3])):
        event, batches = evaluate(build(limit, rows))
        large = [batch for batch in batches if name_of(batch.targets.ravel()) == "large"]
        assert [len(batch.tokens) for batch in large] == sizes
        joined = Rows(*(np.concatenate(arrays) for arrays in zip(*large, strict=True)))
        assert [bool(row.any()) for row in joined.segments] == [place < limit for place in range(sum(sizes))]
        first = Rows(*(np.concatenate(arrays) for arrays in zip(*whole[:limit], strict=True)))
        for expected, found in zip(first, joined, strict=True):  # the first rows, in their order
            assert (found[:limit] == expected).all()
        mine = count(batches)["large"]
        assert mine["rows"] == limit and event["loss/large"] == pytest.approx(mine["nats"] / mine["targets"])


def test_rows_and_blanks_are_the_same_whatever_the_run_does() -> None:
    event, batches = evaluate(build())
    others: list[dict[str, Any]] = [
        {"seed": 5}, {"data__seed": 3}, {"data__blanks__history": ((0, {"mask": 1.0}),)},
        {"data__blanks__replacement": True}, {"data__temperature": 2.0},
        {"data__weights": ((0, {"large": 1.0, "little": 0.0, "scant": 0.0}),)},
    ]  # fmt: skip
    for changes in others:
        again, same = evaluate(build(**changes))
        assert again == event, changes
        for left, right in zip(batches, same, strict=True):
            assert all((one == other).all() for one, other in zip(left, right, strict=True))


def test_models_of_two_position_streams_are_evaluated_with_two() -> None:
    for position, shape in (("learned_2d", (4, 2, 32)), ("rope", (4, 32))):
        _, batches = evaluate(build(model__position=position))
        assert {batch.positions.shape for batch in batches} == {shape}


def test_losses_are_those_of_the_rows_of_other_versions() -> None:
    """Losses of two versions compare only over the same blanks; to draw others on purpose, change the number here."""
    assert evaluate(build())[0]["loss"] == pytest.approx(GOLDEN, rel=1e-9)


def test_sixteen_tokens_are_enough_and_a_run_without_held_out_text_has_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PREPARED.shards["scant"], "heldout", Documents(8500, [9, 7]))
    event, batches = evaluate(build())
    assert count(batches)["scant"]["rows"] == 1 and math.isfinite(event["loss/scant"])
    for splits in PREPARED.shards.values():
        monkeypatch.setitem(splits, "heldout", Documents(8500, []))
    assert evaluate(build()) == ({}, [])


def test_training_reads_the_other_documents_in_an_order_of_its_seed() -> None:
    def rows(**changes: Any) -> np.ndarray:
        batch = training_batches(build(**changes), PREPARED).at(0, 30)
        return np.stack([batch.tokens, batch.targets])

    ours = set().union(*(splits["train"].ids() for splits in PREPARED.shards.values()))
    assert {int(token) for token in rows().ravel()} - set(range(10)) <= ours
    first = rows(seed=5)
    assert (first == rows(seed=5, data__seed=-1)).all() and (first == rows(seed=6, data__seed=5)).all()
    assert (rows(seed=6) != first).any() and (rows(seed=5, data__seed=0) != first).any()
    assert (rows(seed=0) == rows(seed=6, data__seed=0)).all()
