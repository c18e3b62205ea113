"""The second half of a text, as members with different objectives see it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.data.corpora.prepare import Prepared
from glm_jax.errors import UserError
from glm_jax.sweeps import second_half
from glm_jax.sweeps.group import prepare_all
from glm_jax.training.run import Run
from tests.sweeps.sweep_cases import tiny, write_text

CAUSAL = {"data.blanks.mask": 0.0, "data.blanks.gmask": 1.0, "data.blanks.gmask_min_ratio": 1.0}
GMASK, SOP, EOP, PAD = 4, 6, 7, 0


@pytest.fixture
def special() -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(gmask=GMASK, sop=SOP, eop=EOP, pad=PAD, prefix=()))


TEXT = np.array([11, 12, 13, 14, 15], np.int32)


def test_a_bidirectional_member_has_the_first_half_as_context(tmp_path: Path, special: Any) -> None:
    batch = second_half.make_batch([TEXT], tiny(tmp_path), special)
    assert batch.tokens[0, :7].tolist() == [11, 12, GMASK, SOP, 13, 14, 15]
    assert batch.context[0, :8].tolist() == [True] * 3 + [False] * 5
    counted = batch.loss_mask[0] > 0
    assert batch.targets[0, counted].tolist() == [13, 14, 15, EOP]


def test_a_member_with_causal_contexts_reads_the_first_half_from_left_to_right(tmp_path: Path, special: Any) -> None:
    plain, causal = (
        second_half.make_batch([TEXT], tiny(tmp_path, **{"data.blanks.causal_context": causal}), special)
        for causal in (False, True)
    )
    assert not causal.context.any()
    for name in ("tokens", "targets", "positions", "segments", "loss_mask"):
        np.testing.assert_array_equal(getattr(causal, name), getattr(plain, name))


@pytest.mark.parametrize("changes", [
    {"data.blanks.causal_context": True}, {"interventions": ((3, {"data.blanks.causal_context": True}),)},
])  # fmt: skip
def test_a_run_alone_refuses_causal_contexts(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(tmp_path, **changes)
    with pytest.raises(UserError, match="causal_context is for members of a sweep"):
        Run(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_unidirectional_member_reads_it_from_left_to_right(tmp_path: Path, special: Any) -> None:
    config = tiny(tmp_path, **CAUSAL)
    assert second_half.is_unidirectional(config) and not second_half.is_unidirectional(tiny(tmp_path))
    batch = second_half.make_batch([TEXT], config, special)
    assert batch.tokens[0, :7].tolist() == [GMASK, SOP, 11, 12, 13, 14, 15]
    assert batch.context[0, :8].tolist() == [True] + [False] * 7
    counted = batch.loss_mask[0] > 0
    assert batch.targets[0, counted].tolist() == [13, 14, 15, EOP]
    assert batch.positions[0, :7].tolist() == list(range(7)) and batch.segments[0].tolist() == [1] * 7 + [0] * 25


def test_two_streams(tmp_path: Path, special: Any) -> None:
    batch = second_half.make_batch([TEXT], tiny(tmp_path, **{"model.position": "learned_2d"}), special)
    assert batch.positions.shape == (1, 2, 32)
    assert batch.positions[0, :, :7].tolist() == [[0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suffix")
    write_text(folder)
    return folder


def prepared(folder: Path) -> Prepared:
    (found,) = prepare_all([tiny(folder)], lambda line: None).values()
    return found


def test_all_members_predict_the_same_tokens(folder: Path) -> None:
    both = [list(second_half.batches(tiny(folder, **changes), prepared(folder))) for changes in ({}, CAUSAL)]
    assert len(both[0]) == len(both[1]) > 0
    for one, other in zip(*both, strict=True):
        assert one.tokens.shape == (4, 32)
        for a, b in zip(one.targets[one.loss_mask > 0], other.targets[other.loss_mask > 0], strict=True):
            assert a == b


def test_the_loss_is_a_mean_over_the_counted_tokens(folder: Path) -> None:
    config, data = tiny(folder), prepared(folder)
    mean = second_half.evaluate(config, data, lambda batch: 3.0 * batch.loss_mask)
    assert mean == {"loss/second_half": pytest.approx(3.0)}
    masks_alone = tiny(folder, **{"data.blanks.mask": 1.0, "data.blanks.gmask": 0.0})
    assert second_half.evaluate(masks_alone, data, lambda batch: batch.loss_mask) == {}
