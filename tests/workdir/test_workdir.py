"""One run at a time in a workdir."""

from pathlib import Path

import pytest

from glm_jax.errors import UserError
from glm_jax.workdir import folder as workdir


def test_a_second_run_in_a_workdir_is_refused_while_the_first_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    second = workdir.lock(folder)
    with workdir.lock(folder), pytest.raises(UserError, match="another run is using"):
        second.__enter__()
    with workdir.lock(folder):
        assert list(folder.iterdir()) == []
