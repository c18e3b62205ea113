"""The layout of a state by hand, where its layers do not divide evenly, and as the plan counts it."""

import pytest

from glm_jax.cli import main
from glm_jax.config import Experiment, default_config, resolve
from glm_jax.parallel import device_sheet
from glm_jax.planning import estimate, layout
from glm_jax.planning.programs import pieces
from tests.planning import experiments

UNEVEN = {
    "model.num_layers": 7, "model.hidden_size": 16, "model.num_heads": 2, "model.ffn_size": 32,
    "model.vocab_size": 8208, "data.seq_length": 32, "data.tokenizer.vocab_size": 8000,
    "train.global_batch": 4, "train.microbatches": 2, "train.precision": "bfloat16", "mesh.data": 2,
    "mesh.pipeline": 3, "mesh.tensor": 2,
}  # fmt: skip


def uneven(**changes: object) -> Experiment:
    return resolve(default_config(), UNEVEN | {key.replace("__", "."): value for key, value in changes.items()})


def test_an_uneven_state_by_hand() -> None:
    found = layout.layout(uneven())
    assert found.stages == (range(0, 3), range(3, 6), range(6, 7)) and found.mesh["pipeline"] == 3
    by_path = {one.path: one for one in found.arrays}
    qkv = by_path["params/blocks/attention/qkv/kernel"]
    assert qkv.shape == (7, 16, 2, 3, 8) and qkv.padding == (2, 0, 0, 0, 0) and qkv.size == "(7+2)x16x2x3x8"
    assert qkv.bytes == 4 * 3 * (16 // 2) * (2 // 2) * 3 * 8  # 3 layers a stage; `data` halves hidden, `tensor` heads
    bias = by_path["moments/0/mu/blocks/attention/qkv/bias"]
    assert bias.size == "(7+2)x2x3x8" and bias.bytes == 4 * 3 * 1 * 3 * 8  # `data` does not split it
    word = by_path["params/embedding/word"]
    assert word.size == "8208x16" and word.bytes == 4 * 1368 * 8  # 8208 / 6 words on each device of a replica
    assert by_path["step"].size == "-" and by_path["step"].bytes == 4
    # of a layer on a device: qkv and output with biases, GeGLU's two kernels up, one down, with biases, two norms
    layer = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 2 * 16 + 2 * 16) + (16 * 8 + 8) + 2 * 2 * 8
    assert found.bytes("params") == 4 * (3 * layer + 1368 * 8 + 2 * 8)  # and the embedding, and the final norm


@pytest.mark.parametrize("lora", [0, 4])
def test_the_plan_counts_the_same_arrays(lora: int) -> None:
    experiment = uneven(train__lora__rank=lora, train__init_from="folder" if lora else "")
    found, counted = layout.layout(experiment), estimate.plan(experiment, estimate.PROCESSOR, pieces(experiment))
    assert counted.memory.params == sum(one.bytes for one in found.arrays if one.path.startswith(("params/", "base/")))
    counters = 2 * 4  # the step and the samples, which no part of the plan has
    assert counted.memory.params + counted.memory.moments == found.bytes() - counters
    assert counted.layers == (3, 3, 1)


def test_the_layout_of_glm_130b() -> None:
    experiment = resolve(experiments.glm_130b())
    plan = estimate.plan(experiment, device_sheet.find("a100-40gb"), 150_344)
    assert plan.layers == (9, 9, 9, 9, 9, 9, 9, 7)


@pytest.mark.parametrize(
    "layers, says",
    [
        ((9,) * 7 + (7,), "70 layers in 8 stages of 9, 2 places empty: stage 7 has 7"),
        ((2, 2, 1, 0), "5 layers in 4 stages of 2, 3 places empty: stage 2 has 1, stage 3 has 0"),
        ((2, 1), "3 layers in 2 stages of 2, 1 place empty: stage 1 has 1"),
        ((4,), "4 layers in 1 stage of 4"),
    ],
)
def test_stages_in_words(layers: tuple[int, ...], says: str) -> None:
    assert layout.stages_line(layers) == says


def test_specs_end_with_the_stages_and_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--config.{key}={value}" for key, value in UNEVEN.items()]
    assert main.main(["config", "show", "--config=quickstart", "--specs", *arguments]) == 0
    *arrays, stages, total = capsys.readouterr().out.splitlines()
    (qkv,) = (line for line in arrays if line.startswith("params/blocks/attention/qkv/kernel "))
    assert qkv.split()[1] == "(7+2)x16x2x3x8" and qkv.endswith(" 2,304")
    assert stages == "7 layers in 3 stages of 3, 2 places empty: stage 2 has 1"
    listed = sum(int(line.split()[-1].replace(",", "")) for line in arrays)
    assert total.startswith(f"{listed:,} bytes of state on each of 12 devices")
