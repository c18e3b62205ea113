"""Parameters and operations, against GLM-130B's published numbers and a count of the traced pass."""

from typing import Any

import jax
import pytest

from glm_jax.config import Experiment, resolve
from glm_jax.engine import passes
from glm_jax.model import GLMConfig
from glm_jax.parallel import device_sheet
from glm_jax.planning import tracing, work
from tests.planning import experiments
from tests.planning.counting import pass_flops

SMALL = {
    "model.num_layers": 3, "model.hidden_size": 32, "model.num_heads": 4, "model.ffn_size": 48,
    "model.vocab_size": 64, "data.seq_length": 32, "train.global_batch": 16, "train.microbatches": 4,
    "mesh.data": 1, "pipeline.stash": "layer",
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {},
    {"pipeline.stash": "stage"},
    {"pipeline.stash": "products"},
    {"pipeline.stash": "all"},
    {"mesh.pipeline": 2, "mesh.data": 2, "mesh.tensor": 2},
    {"mesh.pipeline": 2, "pipeline.stash": "stage", "pipeline.schedule": "gpipe"},
    {"mesh.pipeline": 2, "pipeline.stash": "all", "model.position": "learned_2d", "model.norm": "pre"},
    {"mesh.tensor": 4, "pipeline.stash": "products", "model.activation": "gelu"},
    {"mesh.data": 4, "mesh.zero": 3, "model.position": "alibi"},
    {"model.attention_dropout": 0.1, "model.hidden_dropout": 0.1, "model.norm": "sandwich", "data.seq_length": 64},
]


def counted(experiment: Experiment) -> tuple[float, float]:
    """Return the operations of a step as `work` has them and as the trace shows them."""
    cfg, mesh = tracing.bind(experiment, device_sheet.find("a100-40gb"), 64)
    rows, scalar = tracing.batch_shapes(experiment), jax.ShapeDtypeStruct((), "float32")
    drops = experiment.model.attention_dropout > 0
    key = jax.eval_shape(lambda: jax.random.key(0)) if drops else None
    closed = jax.make_jaxpr(lambda *arrays: passes.value_and_grad(cfg.engine, mesh, *arrays))(
        tracing.model_shapes(cfg, mesh), rows, key, None, scalar
    )
    length, train = experiment.data.seq_length, experiment.train
    estimated = work.flops(cfg.engine, length).hardware * length * train.global_batch
    return estimated, pass_flops(closed, mesh.shape)


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_operations_are_those_that_the_traced_pass_has(changes: dict[str, Any]) -> None:
    estimated, traced = counted(resolve({}, SMALL | changes))
    assert estimated == pytest.approx(traced, rel=0.005)


def test_the_parts_of_glm_130b() -> None:
    parts = work.parameters(GLMConfig(70, 12288, 96, 32768, 150528))
    assert sum(parts.values()) == 128_697_794_560
    assert sum(parts.values()) - parts["embedding"] == 126_848_106_496
    assert parts["blocks/attention"] == 70 * (4 * 12288**2 + 4 * 12288)


def test_operations_of_glm_130b_are_those_of_its_training_code() -> None:
    experiment = resolve(experiments.glm_130b())
    cfg, _ = tracing.bind(experiment, device_sheet.find("a100-40gb"), 150_344)
    flops = work.flops(cfg.engine, 2048)
    assert flops.hardware == pytest.approx(flops.published, rel=1e-3)
    # its log: 4,224 rows in 88.5 s on 768 devices are 134 TFLOP/s each
    assert flops.hardware * 4224 * 2048 / 88.5 / 768 == pytest.approx(134.1e12, rel=1e-3)
    assert flops.hardware / flops.model == pytest.approx(4 / 3, rel=5e-3)  # the head is not computed again
