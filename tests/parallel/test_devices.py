"""The peak rate of devices, and the memory in use."""

import jax
import pytest

from glm_jax.parallel import mesh
from glm_jax.parallel.devices import matmul_rate, peak_flops, peak_memory


def test_memory_is_that_of_the_fullest_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform = "gpu"

        def __init__(self, peak: int | None) -> None:
            self.peak = peak

        def memory_stats(self) -> dict[str, int] | None:
            return None if self.peak is None else {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7), Device(None)])
    assert peak_memory() == 7


def test_emulated_devices_share_one_measured_peak() -> None:
    grid = mesh.build({"data": 1, "pipeline": 1, "tensor": 1})
    assert 0.1 < peak_flops(grid) / matmul_rate() < 10 and jax.devices()[0].platform == "cpu"
