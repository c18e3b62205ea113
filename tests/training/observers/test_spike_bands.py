"""The running bands of the loss and the gradient norm, and values that leave them, worked out by hand."""

import math
from typing import Any

import pytest

from glm_jax.config import default_config, resolve
from glm_jax.training.observers.spikes import Band, Bands, watch


def build(precision: str = "float32", window: int = 4, deviations: float = 2.0) -> Any:
    config = default_config()
    config.train.precision = precision
    config.train.spike.window, config.train.spike.deviations = window, deviations
    return resolve(config)


def follow(config: Any, losses: list[float], norms: list[float] | None = None) -> tuple[Bands, list[str | None]]:
    bands, reasons = Bands(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        bands, reason = watch(config, bands, loss, norm)
        reasons.append(reason)
    return bands, reasons


def test_the_band_is_a_plain_mean_at_first_and_exponential_later() -> None:
    bands, reasons = follow(build(), [4.0, 2.0, 3.0, 3.0])
    assert reasons == [None] * 4
    assert bands.loss.mean == pytest.approx(3.0) and bands.loss.variance == pytest.approx(0.5)  # of 4, 2, 3, 3
    assert bands.loss.steps == 4 and bands.grad_norm == Band(0.0, 0.0, 4)  # ln 1
    bands, reason = watch(build(), bands, 4.0, math.e)  # weight 1/4: 3/4 (0.5 + 1/4)
    assert reason is not None and "gradient norm 2.718" in reason  # its band has no width yet
    bands, reason = watch(build(deviations=2.0), bands, 4.0, 1.0)
    assert reason is None
    assert bands.loss.mean == pytest.approx(3.25) and bands.loss.variance == pytest.approx(0.5625)


def test_it_watches_after_a_window_and_a_spike_leaves_the_band_as_it_was() -> None:
    limit = 3.0 + 2 * math.sqrt(0.5)
    _, reasons = follow(build(), [4.0, 2.0, 3.0, 90.0])
    assert reasons == [None] * 4  # three values do not make a band
    bands, _ = follow(build(), [4.0, 2.0, 3.0, 3.0])
    same, reason = watch(build(), bands, limit + 1e-6, 1.0)
    assert same == bands and reason == "the loss 4.414 is above its band, which ends at 4.414"
    assert watch(build(), bands, limit - 1e-6, 1.0)[1] is None
    assert watch(build(), bands, -90.0, 1.0)[1] is None  # a low loss is no spike


def test_the_gradient_norm_is_watched_by_its_logarithm() -> None:
    norms = [math.exp(height) for height in (1.0, -1.0, 0.0, 0.0)]  # variance 0.5
    bands, reasons = follow(build(), [1.0] * 4, norms)
    assert reasons == [None] * 4
    assert bands.grad_norm.mean == pytest.approx(0) and bands.grad_norm.variance == pytest.approx(0.5)
    limit = math.exp(2 * math.sqrt(0.5))  # 4.113
    assert watch(build(), bands, 1.0, limit * 0.999)[1] is None
    reason = watch(build(), bands, 1.0, limit * 1.001)[1]
    assert reason == "the gradient norm 4.117 is above its band, which ends at 4.113"


def test_what_is_not_finite_is_a_spike_at_once_except_the_norm_under_a_loss_scale() -> None:
    for config in (build(), build("bfloat16")):
        assert watch(config, Bands(), math.nan, 1.0) == (Bands(), "the loss is nan")
        assert watch(config, Bands(), 1.0, math.inf) == (Bands(), "the gradient norm is inf")
    half = build("float16")
    assert watch(half, Bands(), math.inf, 1.0)[1] == "the loss is inf"
    bands, reason = watch(half, Bands(), 1.0, math.inf)  # an overflow, which lowers the scale
    assert reason is None and bands == Bands(Band(1.0, 0.0, 1), Band())  # the norm's band does not change


def test_bands_survive_json() -> None:
    bands, _ = follow(build(), [4.0, 2.0], [1.0, 3.0])
    assert Bands.from_json(bands.to_json()) == bands and Bands.from_json(None) == Bands()
