"""Estimates of generation: bytes and bounds by hand, the compiler's peak, and what others measured."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from glm_jax.config import Experiment, resolve
from glm_jax.errors import UserError
from glm_jax.parallel.device_sheet import Device, find
from glm_jax.planning import choices, estimate, generation, program
from glm_jax.planning.allocation import peak_bytes
from glm_jax.planning.programs import Inference, Weights
from tests.planning import experiments

LAYERS, WIDTH, INNER, VOCABULARY = 2, 256, 512, 1024
SMALL = {
    "model.num_layers": LAYERS, "model.hidden_size": WIDTH, "model.num_heads": 4, "model.ffn_size": INNER,
    "model.vocab_size": VOCABULARY, "mesh.data": 1,
}  # fmt: skip
KERNELS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # numbers; GeGLU has two matrices up
OTHERS = LAYERS * (3 * WIDTH + WIDTH + 2 * INNER + WIDTH + 4 * WIDTH) + 2 * WIDTH + VOCABULARY * WIDTH
ROUND = Device("round", (), peak=1e18, memory=1, bandwidth=1e9, link=1e15, source="")


def small(**mesh: int) -> Experiment:
    """Return the small experiment on a mesh."""
    return resolve({}, SMALL | {f"mesh.{axis}": size for axis, size in mesh.items()})


def weights(kind: Weights, group: int | None = None, **mesh: int) -> int:
    """Return the bytes of weights on a device."""
    bound = generation.bind(small(**mesh), Inference(kind, 32, group=group), ROUND, 1000)
    held = generation.weight_bytes(bound)
    return held.outer + held.layers


def test_weights_by_hand() -> None:
    assert weights("float32") == 4 * (KERNELS + OTHERS)
    assert weights("float16") == weights("bfloat16") == 2 * (KERNELS + OTHERS)
    # a float16 scale for each 128 inputs; for the output of attention these are two heads of 64
    assert weights("int4") == KERNELS // 2 + 2 * KERNELS // 128 + 2 * OTHERS
    rows = LAYERS * (3 * WIDTH + WIDTH + 2 * INNER + WIDTH)  # output features
    assert weights("int8") == KERNELS + 2 * rows + 2 * OTHERS
    assert weights("int4", group=0) == KERNELS // 2 + 2 * rows + 2 * OTHERS
    whole = LAYERS * 6 * WIDTH + 2 * WIDTH  # biases of sums, and norms, which no member splits
    assert weights("float16", tensor=2) == KERNELS + (OTHERS - whole) + 2 * whole
    embedding, norm = VOCABULARY * WIDTH, 2 * WIDTH
    assert weights("float16", pipeline=2) == KERNELS + (OTHERS - embedding - norm) + embedding + 2 * norm


def test_the_cache_by_hand() -> None:
    def cache(kind: Weights, rows: int, **mesh: int) -> int:
        return generation.cache_bytes(generation.bind(small(**mesh), Inference(kind, 32, rows), ROUND, 1000))

    assert cache("float32", 1) == 4 * 2 * LAYERS * 32 * WIDTH
    assert cache("int4", 3) == 3 * 2 * 2 * LAYERS * 32 * WIDTH
    assert cache("int4", 3, tensor=2) == cache("int4", 3) // 2
    assert cache("int4", 3, pipeline=2) == cache("int4", 3)  # half of the layers, of twice as many rows
    assert cache("int4", 3, data=2) == cache("int4", 3)  # the rows are for each member


def test_at_best_a_tick_reads_weights_and_cache_once() -> None:
    plan = generation.plan(small(pipeline=2), Inference("float16", 32, 3), ROUND, 1000)
    assert plan.slowest and plan.fastest and plan.rows == 6 and plan.compute == "float16"
    assert plan.fastest.tick_seconds == pytest.approx((plan.memory.weights + plan.memory.cache / 2) / 1e9)
    assert plan.fastest.tokens_per_second == pytest.approx(3 / plan.fastest.tick_seconds)
    assert plan.fastest.tokens_per_row == pytest.approx(1 / 2 / plan.fastest.tick_seconds)  # two groups take turns
    assert plan.slowest.tokens_per_second < plan.fastest.tokens_per_second
    assert plan.slowest.context_seconds > plan.fastest.context_seconds
    assert plan.memory.total == plan.memory.weights + plan.memory.cache + plan.memory.work


def test_rates_are_known_of_a_cpu_in_a_sheet() -> None:
    cpu = dataclasses.replace(ROUND, name="cpu")
    found = [generation.plan(small(), Inference("float32", 32), one, 1000) for one in (cpu, estimate.PROCESSOR)]
    assert [plan.slowest is None for plan in found] == [False, True]


def test_at_best_a_slow_link_is_what_a_tick_waits_for() -> None:
    slow = dataclasses.replace(ROUND, link=1e3)
    plan = generation.plan(small(tensor=2), Inference("float16", 32, 3), slow, 1000)
    # two sums a layer and one of the embedding, half of which goes there and half back; then float32 logits
    assert plan.fastest and plan.fastest.tick_seconds == pytest.approx(
        3 * ((2 * LAYERS + 1) * WIDTH * 2 + VOCABULARY // 2 * 4) / 1e3
    )
    plan = generation.plan(small(pipeline=2), Inference("float16", 32, 3), slow, 1000)
    assert plan.fastest
    # a sum of the embedding and of what enters the head, logits, and what is sent to the next stage
    assert plan.fastest.tick_seconds == pytest.approx(3 * ((1 + 1 + 1) * WIDTH * 2 + VOCABULARY // 2 * 4) / 1e3)


def test_in_turn_kernels_have_latencies_and_dequantised_ones_are_written() -> None:
    sizes = {"data": 1, "pipeline": 1, "tensor": 4}
    found = generation.Load(flops=2e12, moved=3e9, latencies=100, sent={"tensor": 1e9})
    device = Device("round", (), peak=1e12, memory=1, bandwidth=1e9, link=1e9, source="")
    assert generation.in_turn(found, device, sizes) == pytest.approx(2 + 3 + 100 * generation.LATENCY + 1)
    assert generation.at_once(found, 1.5e9, device, sizes) == pytest.approx(2)
    bounds = [generation.bind(small(), Inference(kind, 32), ROUND, 1000) for kind in ("float16", "int8")]
    plain, stored = (generation.load(generation.trace("decode", bound), sizes).moved for bound in bounds)
    assert stored - plain == pytest.approx(3 * KERNELS, rel=0.05)  # 1 + 2 + 2 bytes a number instead of 2


def test_a_collective_takes_a_hop_for_each_member_of_its_ring() -> None:
    def latencies(tensor: int) -> float:
        bound = generation.bind(small(tensor=tensor), Inference("float16", 32), ROUND, 1000)
        return generation.load(generation.trace("decode", bound), dict(bound.mesh.shape)).latencies

    sums, gathers = 2 * LAYERS + 1, 1
    assert latencies(4) - latencies(2) == (2 * sums + gathers) * (3 - 1)


def test_what_depends_on_the_platform_is_that_of_the_target() -> None:
    def chosen(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    jaxpr = jax.make_jaxpr(chosen)(jnp.ones((8, 8))).jaxpr
    for cpu, products in ((True, 2), (False, 1)):
        assert generation.load(program.read(jaxpr, program.Target({}, cpu)), {}).flops == products * 2 * 8**3


def test_a_pass_without_gradients_writes_over_its_arrays() -> None:
    jaxpr = jax.make_jaxpr(lambda x, y: jnp.exp(x @ x) @ y)(jnp.ones((8, 8)), jnp.ones((8, 1))).jaxpr
    read = program.read(jaxpr, program.Target({}, cpu=False))
    assert peak_bytes(read) == 2 * 4 * 8**2  # the product and its exponential
    assert peak_bytes(read, forward=True) == 4 * 8**2 + 4 * 8  # either, and the result


def test_glm_130b_on_four_rtx_3090() -> None:
    experiment = resolve(experiments.glm_130b(), {"mesh.data": 1, "mesh.pipeline": 1, "mesh.tensor": 4})
    device, memory = find("rtx3090"), int(23e9)
    found = choices.choice(experiment, Inference("int4", 2048), device, 150_344, memory)
    assert found.fits and found.plan and found.devices == 4
    assert found.plan.memory.total == pytest.approx(19.57e9, rel=0.03)  # compiled for it by jax 0.12.0.1
    eight = choices.choice(experiment, Inference("int8", 2048), device, 150_344, memory)
    assert not eight.fits and eight.plan is None and eight.weights > memory


def test_choices_are_in_the_order_of_precision() -> None:
    found = list(choices.choices(small(), Inference("float16", 32, group=64), estimate.PROCESSOR, 1000, 0, (1, 2, 8)))
    meshes = [(1, 1), (1, 2), (2, 1), (2, 4)]  # two layers have no four stages, and four heads no eight members
    assert [(one.inference.weights, one.experiment.mesh.pipeline, one.experiment.mesh.tensor) for one in found] == [
        (kind, *mesh) for kind in ("float32", "float16", "int8", "int4") for mesh in meshes
    ]
    assert [one.inference.group for one in found] == [None] * 8 + [64] * 8
    assert not any(one.fits or one.plan for one in found) and choices.best(found) == []
    assert choices.kinds(find("v5e"))[1] == "bfloat16"


def test_the_best_choice_has_few_devices_then_precision_then_speed() -> None:
    plan = generation.plan(small(), Inference("float16", 32), ROUND, 1000)
    rate = plan.slowest
    assert rate

    def choice(kind: Weights, pipeline: int, tensor: int, tokens: float, fits: bool = True) -> choices.Choice:
        slowest = dataclasses.replace(rate, tokens_per_second=tokens)
        experiment = small(pipeline=pipeline, tensor=tensor)
        return choices.Choice(experiment, Inference(kind, 32), 1, 1, dataclasses.replace(plan, slowest=slowest), fits)

    slow, fast = choice("float16", 1, 2, 3.0), choice("float16", 2, 1, 4.0)
    larger, four, single = choice("float16", 2, 2, 9.0), choice("int4", 1, 2, 9.0), choice("int8", 1, 1, 1.0)
    useless = choice("int4", 1, 1, 9.0, fits=False)
    assert choices.best([slow, fast, larger, single, useless, four]) == [single, fast, four]


def test_a_model_that_does_not_fit_a_mesh_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh.tensor=3 does not divide model.num_heads"):
        generation.plan(small(tensor=3), Inference("float16", 32), ROUND, 1000)
    with pytest.raises(UserError, match="-1"):
        generation.plan(small(data=-1), Inference("float16", 32), ROUND, 1000)


# more are in tests/proofs/generation_grid.py
GRID: list[dict[str, Any]] = [{}, {"weights": "int4", "mesh.tensor": 2}, {"mesh.pipeline": 2}]


@pytest.mark.slow
def test_estimates_are_within_a_tenth_of_the_compiled_peak() -> None:
    pairs = experiments.peaks("generated.py", GRID)
    assert [estimated / compiled for estimated, compiled in pairs] == pytest.approx([1] * len(GRID), abs=0.1)
