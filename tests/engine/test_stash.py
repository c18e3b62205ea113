"""What is kept for the backward pass, against the memory that a compiled pass takes."""

import dataclasses

import jax
import pytest

from glm_jax import model
from glm_jax.config import resolve
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import EngineConfig, build, passes, stash
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel.pipeline.stage import Keep

ROWS, LENGTH = 4, 256
CONFIG = EngineConfig(GLMConfig(8, 64, 4, 176, 512), 512, 3, attention="blockwise", keep="products")


def temporaries(cfg: EngineConfig) -> int:
    """Return the temporary bytes of a compiled pass over one microbatch."""
    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    params = jax.eval_shape(lambda: model.init(cfg.model, jax.random.key(0)))
    lowered = jax.jit(passes.value_and_grad, static_argnums=(0, 1)).lower(
        cfg, mesh, params, Rows.abstract((1, ROWS, LENGTH))
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("keep", ["products", "all"])
def test_bytes_of_a_layer_are_those_that_the_program_takes(keep: Keep) -> None:
    more = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=16))
    at_eight, at_sixteen = (temporaries(dataclasses.replace(cfg, keep=keep)) for cfg in (CONFIG, more))
    blocks = jax.eval_shape(lambda: model.init(CONFIG.model, jax.random.key(0))["blocks"])
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(blocks))
    kept = 8 * stash.layer_bytes(dataclasses.replace(CONFIG, keep=keep), ROWS, LENGTH)
    assert 0.9 * kept < at_sixteen - at_eight < 1.1 * (kept + 2 * weights)  # sums of gradients, and copies of weights


@pytest.mark.parametrize(
    "sizes, options, share, expected",
    [
        ((1, 1, 1), {}, 1.01, "products"),
        ((1, 1, 1), {}, 0.99, "layer"),
        ((2, 1, 1), {}, 0.51, "products"),
        ((1, 1, 2), {}, 0.51, "products"),
        ((1, 2, 1), {}, 9.0, "layer"),
        ((1, 1, 1), {"zero": 3}, 9.0, "layer"),
    ],
)
def test_products_are_kept_where_they_fit(
    sizes: tuple[int, ...], options: dict[str, int], share: float, expected: str
) -> None:
    mesh: jax.sharding.Mesh = jax.sharding.AbstractMesh(sizes, meshes.AXES)  # type: ignore[assignment]
    cfg = dataclasses.replace(CONFIG, **options)
    memory = int(share * 8 * stash.layer_bytes(CONFIG, ROWS, LENGTH) / stash.BUDGET)
    assert stash.choose(cfg, mesh, ROWS, LENGTH, memory) == expected


def test_bytes_of_a_layer_by_hand() -> None:
    cfg = EngineConfig(GLMConfig(1, 64, 4, 176, 512, position="learned_2d"), 512, 3, attention="blockwise")
    # x, queries to mixed values, those again and x, norms, halves and their product; or x, what products and attention
    # give (Pre-LN needs no result of the last one), and logsumexps
    floats = {"all": 64 + 64 * 4 + 64 * 2 + 64 * 3 + 176 * 3, "products": 64 + 64 * 3 + 64 + 4 + 64 + 176 * 2}
    for keep, token in floats.items():
        held = stash.layer_bytes(dataclasses.replace(cfg, keep=keep), ROWS, LENGTH)
        assert held == pytest.approx(4 * ROWS * LENGTH * token, rel={"all": 0.1, "products": 0}[keep])


def test_the_config_decides_and_a_mesh_that_does_not_divide_is_refused_first() -> None:
    small = {
        "mesh.data": 1,
        "model.num_layers": 2,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "data.seq_length": 32,
    }
    config = resolve({}, {**small, "train.global_batch": 4, "train.microbatches": 4})
    assert build(config).config.keep == "products"
    staged = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, stash="stage"))
    assert build(staged).config.keep == "stage"
    assert build(config, abstract=True).config.keep == "layer"  # no device says how much memory it has
    wide = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2))
    with pytest.raises(UserError, match="mesh.data=2"):
        build(wide, abstract=True)
