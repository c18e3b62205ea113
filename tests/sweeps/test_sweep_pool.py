"""The pool of a sweep's processes, with none of them started."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.signals import ENDING
from glm_jax.sweeps import run


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_that_does_not_end_the_wait_for_a_group_still_stops_the_sweep(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread takes the signal, so the main thread keeps waiting, as after a signal just before its wait."""
    seen = []

    def train(pool: Any, group: Any) -> None:
        time.sleep(0.2)  # the main thread waits by now; if it does not, the test passes
        signal.pthread_kill(threading.get_ident(), number)
        last = time.monotonic() + 60
        while not pool._stopping and time.monotonic() < last:
            time.sleep(0.01)
        seen.append(pool._stopping)

    monkeypatch.setattr(run._Pool, "_train", train)
    groups: Any = [SimpleNamespace(steps=1, members=(0,))]
    assert run._Pool(tmp_path, groups, 1, lambda line: None).go() is None
    assert seen == [True]
