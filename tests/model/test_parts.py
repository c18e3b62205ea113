"""Patterns that name parts of a model, and adapters merged into params, against numbers of numpy."""

import jax
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config.training import Lora
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig, lora, parts

MODEL = GLMConfig(3, 8, 2, 12, 16)
KERNELS = {("attention", "qkv"), ("attention", "output"), ("feedforward", "up"), ("feedforward", "down")}


def chosen(*patterns: str) -> dict[str, list[int]]:
    """Return the layers that patterns choose of each param; an empty list for a param without layers."""
    found = parts.select(patterns, MODEL, "train.freeze")
    return {"/".join(path): np.flatnonzero(some).tolist() if path[0] == "blocks" else []
            for path, some in found.items() if some.any()}  # fmt: skip


def test_a_pattern_is_the_beginning_of_a_path() -> None:
    assert chosen("embedding") == {"embedding/word": []}
    assert chosen("final_norm/bias", "embedding/word") == {"final_norm/bias": [], "embedding/word": []}
    assert chosen("blocks/attention/qkv/") == {f"blocks/attention/qkv/{name}": [0, 1, 2] for name in ("kernel", "bias")}
    assert chosen("blocks/*/*/kernel") == {f"blocks/{one}/{two}/kernel": [0, 1, 2] for one, two in KERNELS}
    assert len(chosen("*")) == len(jax.tree.leaves(model.shapes(MODEL)))


def test_layers_are_counted_from_0_and_include_the_last() -> None:
    assert chosen("blocks/1/attention_norm/scale") == {"blocks/attention_norm/scale": [1]}
    assert set(map(tuple, chosen("blocks/0..1").values())) == {(0, 1)}
    assert chosen("blocks/0/attention/qkv/bias", "blocks/2/attention/qkv/bias") == {"blocks/attention/qkv/bias": [0, 2]}


@pytest.mark.parametrize("pattern", ["", "block", "blocks/3", "blocks/2..1", "blocks/0..3", "embedding/0", "blocks/1/x",
                                     "blocks/attention/1", "EMBEDDING", "blocks/-1", "embedding/word/x"])  # fmt: skip
def test_a_pattern_of_nothing_is_refused_with_what_there_is(pattern: str) -> None:
    with pytest.raises(UserError, match=r"train.freeze names '.*it has blocks/attention.*embedding/word.*blocks/0..2$"):
        parts.select((pattern,), MODEL, "train.freeze")


def test_an_adapter_adds_its_product_to_each_kernel_and_begins_at_nothing() -> None:
    config = Lora(rank=2, alpha=6.0)
    params = model.init(MODEL, jax.random.key(0))
    adapters = lora.init(MODEL, config, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapters, 3.0), params)
    draw = np.random.default_rng(0)
    adapters = jax.tree.map(lambda array: np.float32(draw.normal(size=array.shape)), adapters)
    merged = lora.merge(params, adapters, 3.0)
    for one, two in KERNELS:
        kernel, whole = (np.asarray(tree["blocks"][one][two]["kernel"]) for tree in (params, merged))
        pair = adapters["blocks"][one][two]["kernel"]
        inputs = {"output": (2, 4), "down": (12,)}.get(two, (8,))  # heads and their width, F, or D
        for layer in range(3):
            product = pair["a"][layer].reshape(-1, 2) @ pair["b"][layer].reshape(2, -1)
            np.testing.assert_allclose(
                whole[layer].reshape(np.prod(inputs), -1),
                kernel[layer].reshape(np.prod(inputs), -1) + 3 * product,
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
        params["blocks"][one][two]["kernel"] = merged["blocks"][one][two]["kernel"] = None
    jax.tree.map(np.testing.assert_array_equal, merged, params)  # the rest is unchanged


def test_adapters_are_of_their_targets_alone_and_have_named_axes() -> None:
    config = Lora(rank=2, targets=("blocks/attention/output",))
    adapters, axes = lora.init(MODEL, config, jax.random.key(0)), lora.adapter_axes(MODEL, config)
    assert jax.tree.map(np.shape, adapters) == {
        "blocks": {"attention": {"output": {"kernel": {"a": (3, 2, 4, 2), "b": (3, 2, 8)}}}}
    }
    assert axes["blocks"]["attention"]["output"]["kernel"] == {
        "a": ("layers", "heads", None, None), "b": ("layers", None, "hidden")
    }  # fmt: skip
    wide = lora.init(GLMConfig(2, 512, 2, 12, 16), Lora(rank=64), jax.random.key(0))
    a = wide["blocks"]["attention"]["qkv"]["kernel"]["a"]
    assert float(a.std()) == pytest.approx(512**-0.5, rel=0.02)


@pytest.mark.parametrize(
    "targets", [("embedding",), ("blocks/0..1/attention",), ("blocks/attention_norm",), ("x",), ()]
)
def test_targets_without_a_whole_kernel_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="train.lora.targets"):
        lora.init(MODEL, Lora(rank=2, targets=targets), jax.random.key(0))
