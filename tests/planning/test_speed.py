"""Loads, bounds and traffic, by hand."""

import dataclasses
from fractions import Fraction

import jax
import pytest

from glm_jax.config import resolve
from glm_jax.parallel.device_sheet import Device, find
from glm_jax.planning import estimate, program, speed
from glm_jax.planning.work import Flops
from tests.planning import experiments

DEVICE = Device("round", (), peak=1e12, memory=1, bandwidth=1e9, link=1e9, source="", network=1e8, node=8)


def test_the_bounds_of_a_product_and_an_exponential() -> None:
    x = jax.ShapeDtypeStruct((1000, 1000), "float32")
    traced = program.read(jax.make_jaxpr(lambda x: jax.numpy.exp(x * 2) @ x)(x).jaxpr, program.Target({}, cpu=False))
    load = speed.of_program(traced, DEVICE)
    assert load.flops == 2e9
    assert load.kernels == pytest.approx((8 + 12) * 1e6 / 1e9)  # exp; product, slower in memory than in products
    assert load.operations == pytest.approx((8 + 8 + 12) * 1e6 / 1e9 + 2e9 / 1e12)  # the multiplication, too


def test_a_step_is_at_most_as_long_as_everything_in_turn() -> None:
    load = speed.Load(kernels=3.0, operations=5.0, flops=2e12, sent={"data": 2e8, "tensor": 1e9})
    sizes = {"data": 4, "pipeline": 2, "tensor": 2}
    flops = Flops(model=300.0, hardware=400.0, published=400.0)
    slowest, fastest = speed.bracket(load, flops, int(8e10), Fraction(1, 4), DEVICE, sizes)
    assert slowest.step_seconds == pytest.approx(5 / 0.75 + 2 + 1) and fastest.step_seconds == pytest.approx(3 / 0.75)
    assert fastest.mfu == pytest.approx(300 * 8e10 / 4 / 16e12)
    slow = dataclasses.replace(DEVICE, network=1e7)
    assert speed.bracket(load, flops, int(8e10), Fraction(1, 4), slow, sizes)[1].step_seconds == pytest.approx(20)


def test_groups_inside_a_node_use_its_links() -> None:
    sizes = {"data": 4, "pipeline": 2, "tensor": 4}
    assert [speed.span(axes, sizes) for axes in ("tensor", "pipeline+tensor", "data")] == [4, 8, 32]
    seconds = speed.link_seconds({"tensor": 1e9, "pipeline": 1e9, "data": 1e9}, DEVICE, sizes)
    assert seconds == pytest.approx({"tensor": 1, "pipeline": 1, "data": 10})
    alone = dataclasses.replace(DEVICE, network=None)
    assert speed.link_seconds({"data": 1e9}, alone, sizes) == pytest.approx({"data": 1})


def test_what_a_device_of_glm_130b_sends_by_hand() -> None:
    sent = estimate.plan(resolve(experiments.glm_130b()), find("a100-40gb"), 150_344).sent
    stream = 2 * 2048 * 12288  # bytes of a row in float16
    # in and out of two sublayers: forward, again without the last, backward; embedding and head: there and back
    of_tensor = 176 * (9 * 11 + 2 + 2) * stream * 3 // 4
    assert sent["tensor"] == pytest.approx(of_tensor, rel=1e-3)
    # 190 ticks send an output and a gradient; embedding and head add up over the stages as often
    of_pipeline = 190 * 2 * stream // 4 + 176 * (2 + 2) * 2 * stream // 4 * 7 // 8
    assert sent["pipeline"] == pytest.approx(of_pipeline, rel=1e-3)
    matrices = 9 * (4 * 12288**2 + 3 * 12288 * 32768) // 4 + 150528 * 12288 // 32
    assert sent["data"] == pytest.approx((2 + 4) * matrices * 23 // 24, rel=0.01)  # float16 weights, float32 sums
