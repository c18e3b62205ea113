"""Weights of 8 and 4 bits: against the official converter's numbers, a plain numpy reference, and numbers by hand."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.errors import UserError
from glm_jax.inference.quantize import quantize as quantize_for_inference
from glm_jax.model import GLMConfig, quantized
from glm_jax.model.quantized import INPUTS, Quantized, Scheme, dequantize, pack, quantize, quantize_params, unpack
from glm_jax.parallel import partition

GOLDENS = Path(__file__).parent.parent / "goldens" / "glm130b_quantized"
SMALL = GLMConfig(num_layers=2, hidden_size=24, num_heads=4, ffn_size=40, vocab_size=32, max_length=16)
EQUATIONS = {  # of the four kernels: the einsum, the shape of x and that of the kernel
    "qkv": ("bsd,dnck->cbsnk", (2, 3, 8), (8, 4, 3, 5)),
    "output": ("bsnk,nkd->bsd", (2, 3, 3, 4), (3, 4, 8)),
    "up": ("bsd,dcf->cbsf", (2, 3, 8), (8, 2, 6)),
    "down": ("bsf,fd->bsd", (2, 3, 10), (10, 7)),
}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def reference(weight: np.ndarray, bits: int) -> tuple[np.float16, np.ndarray, np.ndarray]:
    """Quantise one group, a number at a time in float16: its scale, integers and dequantised numbers."""
    half = weight.astype(np.float16).ravel()
    scale = np.float16(np.abs(half).max() / np.float16(2 ** (bits - 1) - 1))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = [min(max(int(np.rint(w / scale)), lowest), highest) if scale else 0 for w in half]
    return scale, np.array(integers), np.array([np.float16(q) * scale for q in integers])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("transform", [lambda function: function, lambda f: jax.jit(f, static_argnums=(1, 2, 3))])
def test_rows_are_those_of_the_official_converter(bits: int, transform: Any) -> None:
    with np.load(GOLDENS / "quantize_rows.npz") as arrays:
        weight = arrays["weight"]  # [out, in]
        scale, integers, stored, dequantized, defined = (
            arrays[f"int{bits}/{name}"] for name in ("scale", "integers", "stored", "dequantized", "row_defined")
        )
    made = transform(quantize)(jnp.asarray(weight.T), bits, (1, len(weight)), -2)
    assert made.values.dtype == jnp.int8 and made.scales.dtype == jnp.float16 and made.shape == weight.T.shape
    np.testing.assert_array_equal(made.scales[0], scale)
    np.testing.assert_array_equal(made.values, stored.T)
    found = unpack(made.values, 0) if bits == 4 else made.values
    np.testing.assert_array_equal(found, integers.T)
    np.testing.assert_array_equal(dequantize(made, jnp.float16)[:, defined], dequantized.T[:, defined])
    assert not defined.all() and not np.asarray(found)[:, ~defined].any()
    assert not np.asarray(dequantize(made, jnp.float32))[:, ~defined].any()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_packing_puts_the_even_number_in_the_high_half(axis: int) -> None:
    integers = np.array(list(itertools.product(range(-8, 8), repeat=3)), np.int8).reshape(64, 32, 6)
    packed = np.asarray(pack(jnp.asarray(integers), axis))
    moved = np.moveaxis(integers, axis, 0).astype(int)
    wanted = np.array([(even % 16) * 16 + odd % 16 for even, odd in zip(moved[::2], moved[1::2], strict=True)])
    np.testing.assert_array_equal(np.moveaxis(packed, axis, 0).view(np.uint8), wanted)
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), axis), integers)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [(2, 1, 1, 5), (2, 3, 1, 5), (2, 3, 2, 5), (2, 1, 8, 5)])
@pytest.mark.parametrize("scale", [1.0, 2e-4, 3e-7])  # subnormal scales, and so rough that integers are clipped
def test_groups_are_quantised_one_by_one(bits: int, groups: tuple[int, ...], scale: float) -> None:
    kernel = random(2, 3, 8, 5, scale=scale)
    made = jax.jit(quantize, static_argnums=(1, 2, 3))(kernel, bits, groups, -2)
    integers = np.asarray(unpack(made.values, -2) if bits == 4 else made.values)
    found = np.asarray(jax.jit(dequantize, static_argnums=1)(made, jnp.float32))
    sizes = [size // count for size, count in zip(kernel.shape, groups, strict=True)]
    for place in itertools.product(*map(range, groups)):
        region = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, sizes, strict=True))
        wanted = reference(kernel[region], bits)
        assert made.scales[place] == wanted[0]
        np.testing.assert_array_equal(integers[region].ravel(), wanted[1])
        np.testing.assert_array_equal(found[region].ravel(), wanted[2].astype(np.float32))


@pytest.mark.parametrize(
    "bits, weight, scale, zero, integers",
    [
        (4, [-2, 0, 5, 1.5], 0.5, 3, [-7, -3, 7, 0]),
        (4, [0, 1, 2, 14], 1, 7, [-7, -6, -5, 7]),
        (4, [1, 2.5, 3.5, 15], 1, 8, [-7, -6, -4, 7]),  # halves to even: 2 and 4
        (8, [-25.5, 0, 1, 101.5], 0.5, 76, [-127, -76, -74, 127]),
        (4, [3, 3, 3, 3], 3, 8, [-7, -7, -7, -7]),
        (4, [-3, -3, -3, -3], 3, 6, [-7, -7, -7, -7]),
        (8, [0, 0, 0, 0], 0, 127, [-127, -127, -127, -127]),
    ],
)
def test_zero_points_by_hand(bits: int, weight: list[float], scale: float, zero: int, integers: list[int]) -> None:
    made = quantize(jnp.asarray(weight)[:, None], bits, (1, 1), -2, "zeropoint")
    assert made.scales.tolist() == [[scale]] and made.zeros is not None and made.zeros.tolist() == [[zero]]
    found = unpack(made.values, 0) if bits == 4 else made.values
    assert found[:, 0].tolist() == integers
    wanted = [scale * (q + zero) for q in integers]
    assert dequantize(made, jnp.float32)[:, 0].tolist() == wanted
    assert max(abs(left - right) for left, right in zip(wanted, weight, strict=True)) <= scale / 2


def test_zero_points_may_be_larger_than_float16_holds() -> None:
    weight = np.array([[1000], [1000.5], [1001]])
    made = quantize(jnp.asarray(weight), 8, (1, 1), -2, "zeropoint")
    assert made.zeros is not None and made.zeros[0, 0] > 2**17
    np.testing.assert_allclose(dequantize(made, jnp.float32), weight, rtol=0, atol=0.5)


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("bits, rounding", [(8, "absmax"), (4, "absmax"), (4, "zeropoint")])
def test_products_are_those_of_the_dequantised_kernel(
    name: str, parts: int, bits: int, rounding: quantized.Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "CPU_PARTS", parts)
    equation, of_x, shape = EQUATIONS[name]
    x, kernel = random(*of_x), random(*shape, seed=1)
    inputs = 2 if name == "output" else 1
    made = quantize(jnp.asarray(kernel), bits, (1,) * inputs + shape[inputs:], inputs - len(shape) - 1,
                    rounding)  # fmt: skip
    product = np.asarray(quantized.einsum(equation, jnp.asarray(x), made))
    wanted = np.einsum(equation, x, np.asarray(dequantize(made, jnp.float32)))
    np.testing.assert_allclose(product, wanted, rtol=0, atol=1e-5)
    assert np.abs(product - np.einsum(equation, x, kernel)).max() > 1e-3
    plain = quantized.einsum(equation, jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(plain, np.einsum(equation, x, kernel), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def params() -> Any:
    shapes = jax.eval_shape(lambda: model.init(SMALL, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(random(*leaf.shape, scale=0.2)), shapes)


def dense(params: Any) -> Any:
    """Dequantise every kernel."""
    return jax.tree.map(lambda leaf: dequantize(leaf, jnp.float32) if isinstance(leaf, Quantized) else leaf, params,
                        is_leaf=quantized.is_quantized)  # fmt: skip


def test_the_model_runs_on_quantised_kernels(params: Any) -> None:
    arguments = (jnp.arange(8)[None] % 32, jnp.arange(8)[None], jnp.tri(8, dtype=bool)[None])
    made = quantize_for_inference(params, 4, group=8)
    logits, wanted, before = (jax.jit(model.apply, static_argnums=0)(SMALL, weights, *arguments)
                              for weights in (made, dense(made), params))  # fmt: skip
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
    assert np.abs(logits - before).max() > 1e-2
    kernel = made["blocks"]["attention"]["output"]["kernel"]
    assert kernel.values.shape == (2, 4, 3, 24) and kernel.scales.shape == (2, 4, 1, 24)  # K is 6: 1 group a head


def test_the_defaults_are_rows_of_8_bits_and_groups_of_4(params: Any) -> None:
    wide = {"blocks": {"feedforward": {"down": {"kernel": jnp.ones((1, 384, 3))}}}, "embedding": jnp.ones(3)}
    for bits, count in ((8, 1), (4, 3)):
        made = quantize_for_inference(wide, bits)
        assert made["blocks"]["feedforward"]["down"]["kernel"].scales.shape == (1, count, 3)
        assert made["embedding"] is wide["embedding"]


@pytest.mark.parametrize(
    "group, shape, counts",
    [
        (0, (2, 6, 8, 5), (1, 1)),
        (5, (2, 6, 8, 5), (6, 2)),  # the largest divisor up to 5 is 4
        (8, (2, 6, 8, 5), (6, 1)),
        (31, (2, 6, 8, 5), (2, 1)),  # 3 heads of 8
        (99, (2, 6, 8, 5), (1, 1)),
    ],
)
def test_a_group_is_the_largest_divisor(group: int, shape: tuple[int, ...], counts: tuple[int, ...]) -> None:
    groups, axis = Scheme(4, group).layout(("blocks", "attention", "output", "kernel"), shape)
    assert (groups, axis) == ((2, *counts, 5), -2)


def test_axes_and_scales_fit_a_mesh(params: Any) -> None:
    made = quantize_params(params, Scheme(4, ranks=2))
    axes = quantized.logical_axes(model.logical_axes(SMALL), made)
    down, output, up = (axes["blocks"][part][name]["kernel"] for part, name in
                        (("feedforward", "down"), ("attention", "output"), ("feedforward", "up")))  # fmt: skip
    assert (down.values, down.scales) == (("layers", "ffn", "hidden"),) * 2 and down.zeros is None
    assert (output.values, output.scales) == (("layers", "heads", None, "hidden"),) * 2
    assert (up.values, up.scales) == (("layers", "hidden", None, "ffn"), ("layers", None, None, "ffn"))
    specs = partition.specs(axes)
    assert specs["blocks"]["feedforward"]["down"]["kernel"].scales == jax.P("pipeline", "tensor", None)
    assert jax.tree.structure(made) == jax.tree.structure(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    fitted = quantized.fit(made, axes, {"ffn": 4, "heads": 4})
    assert fitted["blocks"]["feedforward"]["down"]["kernel"].scales.shape == (2, 4, 24)
    assert fitted["blocks"]["attention"]["output"]["kernel"].scales.shape == (2, 4, 1, 24)
    for left, right in zip(jax.tree.leaves(dense(fitted)), jax.tree.leaves(dense(made)), strict=True):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(UserError, match="40 input features of 4 bits cannot be split over 8 devices: choose 8 bits"):
        quantized.fit(made, axes, {"ffn": 8})


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda params: Scheme(3), "weights of 3 bits are not supported: choose 8 or 4"),
        (lambda params: Scheme(8, -1), "a group of -1 input features is not possible"),
        (lambda params: Scheme(8, rounding="up"), "rounding 'up' is unknown: choose absmax or zeropoint"),  # pyright: ignore[reportArgumentType]
        (lambda params: Scheme(4).layout(next(iter(INPUTS)), (1, 7, 2, 3, 2)), "qkv.kernel has 7 input features"),
        (
            lambda params: quantize_params(quantize_params(params, Scheme(8)), Scheme(4)),
            "qkv.kernel has 8 bits already|output.kernel has 8 bits already",
        ),
        (
            lambda params: quantize_params(jax.tree.map(lambda leaf: leaf * 1e7, params), Scheme(8)),
            "kernel has a number that is not finite in float16",
        ),
    ],
)
def test_what_cannot_be_quantised_is_one_line(make: Any, words: str, params: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make(params)
    assert "\n" not in str(caught.value)
