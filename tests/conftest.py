"""Shared by all tests: a persistent compilation cache, the settings of hypothesis, and the mesh of mesh-bound tests."""

import os
import signal
from collections import Counter
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests compile much and compute little: this halves the compile time, for slower code.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

import pytest  # noqa: E402 (jax reads the environment when it is imported)
from hypothesis import HealthCheck, settings  # noqa: E402

# Load does not decide a test; the examples are the same in every run, so that a test fails for everybody or nobody.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("pinned", patient, derandomize=True)
settings.register_profile("free", patient, derandomize=False, print_blob=True)  # .ci/nightly looks for new ones
settings.load_profile("pinned")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: what a library packed may hold the time, and workers would disagree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with many slow tests first: with workers, the last ones to finish are then short."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_configure(config: pytest.Config) -> None:
    """Keep that order among workers, and let no signal be ignored.

    A shell starts background jobs so that they ignore signals, and tests of signals would fail.
    """
    config.option.loadscopereorder = False  # xdist would take files with many tests first, however short
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def mesh_sizes() -> dict[str, int]:
    """Return the mesh of this test run: 1 x 1 x 1, or what GLM_JAX_TEST_MESH says, such as 2,1,2."""
    sizes = os.environ.get("GLM_JAX_TEST_MESH", "1,1,1").split(",")
    return dict(zip(("data", "pipeline", "tensor"), map(int, sizes), strict=True))
