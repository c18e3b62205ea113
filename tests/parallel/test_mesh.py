"""Meshes, specs and placing, on one device or on shapes alone; and a run of two processes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from glm_jax import model
from glm_jax.engine import bind
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh, partition
from tests.patience import HANG

ROOT = Path(__file__).parents[2]
SMALL = GLMConfig(num_layers=3, hidden_size=32, num_heads=4, ffn_size=48, vocab_size=64, max_length=32)
GLM_130B = GLMConfig(num_layers=70, hidden_size=12288, num_heads=96, ffn_size=32768, vocab_size=150528)


def test_an_axis_takes_the_rest_of_the_devices() -> None:
    assert mesh.resolve({"data": -1, "pipeline": 2, "tensor": 2}, 8) == {"data": 2, "pipeline": 2, "tensor": 2}
    assert mesh.resolve({"data": 1, "pipeline": 1, "tensor": 1}, 8) == {"data": 1, "pipeline": 1, "tensor": 1}
    assert mesh.build({"data": -1, "pipeline": 1, "tensor": 1}, jax.devices()[:1]).shape["data"] == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 2), "mesh.data and mesh.pipeline are both -1: only one axis can take the rest"),
        ((-1, 3, 2), r"mesh.data=-1 needs the other axes \(mesh.pipeline=3 x mesh.tensor=2, 6 devices\) to divide 8"),
        ((0, 1, 1), "mesh.data is 0, it must be at least 1, or -1"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh.resolve(dict(zip(mesh.AXES, sizes, strict=True)), 8)


def test_the_nearest_divisor_is_named() -> None:
    with pytest.raises(UserError, match=r"\(mesh.pipeline=5 x mesh.tensor=1, 5 devices\) to divide 8 devices: 4 would"):
        mesh.resolve({"data": -1, "pipeline": 5, "tensor": 1}, 8)
    quantities = [("data", "rows", 12), ("tensor", "heads", 10)]
    mesh.check_divides({"data": 6, "tensor": 10}, quantities)
    for size, nearest in ((4, "2 or 5"), (6, "5 or 10"), (11, "10"), (3, "2 or 5")):
        with pytest.raises(UserError) as raised:
            mesh.check_divides({"data": 12, "tensor": size}, quantities)
        assert str(raised.value) == f"mesh.tensor={size} does not divide heads (10): {nearest} would"


class Device(NamedTuple):
    """What `build` needs to know of a device."""

    process_index: int
    platform: str = "cpu"


def test_devices_that_make_no_mesh_are_refused() -> None:
    sizes = {"data": 2, "pipeline": 1, "tensor": 1}
    with pytest.raises(UserError, match="uses 2 of the 3 devices of several processes: it must use all"):
        mesh.build(sizes, [Device(0), Device(0), Device(1)])
    with pytest.raises(UserError, match="; on CPU, JAX_NUM_CPU_DEVICES=2 emulates them$"):
        mesh.build(sizes, [Device(0)])
    with pytest.raises(UserError, match="make the mesh smaller$"):
        mesh.build(sizes, [Device(0, "gpu")])


def test_a_mesh_larger_than_the_devices_is_refused() -> None:
    with pytest.raises(
        UserError, match="mesh.data=2 x mesh.pipeline=1 x mesh.tensor=1 needs 2 devices and there are 1"
    ):
        mesh.build({"data": 2, "pipeline": 1, "tensor": 1}, jax.devices()[:1])


def abstract(*shape: int) -> Any:
    """Return a mesh without devices."""
    return jax.sharding.AbstractMesh(shape, mesh.AXES)


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        ((1, 1, 3), {}, r"mesh.tensor=3 does not divide model.num_heads \(4\): 2 or 4 would"),
        ((3, 1, 1), {}, r"mesh.data=3 does not divide rows of a microbatch.* \(8\): 2 or 4 would"),
        ((1, 4, 1), {}, r"mesh.pipeline=4 is more stages than model.num_layers \(3\) can fill: at most 3"),
        (
            (1, 3, 1),
            {},
            r"mesh.pipeline x mesh.tensor=3 does not divide the padded vocabulary \(64\): 2 or 4 would, or a",
        ),
        ((1, 2, 1), {"zero": 3}, "mesh.zero=3 .* cannot be combined with mesh.pipeline=2"),
        ((1, 1, 1), {"zero": 3, "keep": "all"}, "mesh.zero=3 .* cannot be combined with pipeline.stash=all"),
    ],
)
def test_a_mesh_that_the_model_does_not_fit_is_refused(shape: tuple, changes: dict, message: str) -> None:
    cfg = bind.EngineConfig(SMALL, 64, 3, **changes)
    with pytest.raises(UserError, match=message):
        bind.check(cfg, abstract(*shape), global_batch=16, microbatches=2, length=32)


@pytest.mark.parametrize(
    "model_changes, length, message",
    [
        ({"ffn_size": 50}, 32, r"mesh.tensor=4 does not divide model.ffn_size \(50\): 2 or 5 would"),
        ({}, 30, r"mesh.tensor=4 does not divide data.seq_length \(30\): 3 or 5 would"),
    ],
)
def test_all_that_tensor_splits_must_divide(model_changes: dict, length: int, message: str) -> None:
    cfg = bind.EngineConfig(dataclasses.replace(SMALL, **model_changes), 64, 3)
    with pytest.raises(UserError, match=message):
        bind.check(cfg, abstract(1, 1, 4), global_batch=16, microbatches=2, length=length)


def test_a_mesh_that_the_model_just_fits_is_taken() -> None:
    fits = dataclasses.replace(SMALL, vocab_size=60)
    plain = bind.EngineConfig(fits, 60, 3)
    for shape, cfg in (
        ((8, 3, 4), plain),
        ((8, 1, 4), dataclasses.replace(plain, zero=3)),
        ((8, 3, 4), dataclasses.replace(plain, keep="all")),
    ):
        bind.check(cfg, abstract(*shape), global_batch=16, microbatches=2, length=32)


def test_specs_by_hand() -> None:
    names = ("layers", None, "heads")
    assert partition.spec(names) == jax.P("pipeline", None, "tensor")
    assert partition.batch_spec(2) == jax.P(None, "data") and partition.batch_spec(4) == jax.P(None, "data", None, None)
    with pytest.raises(KeyError):
        partition.spec(("head",))
    assert partition.state_specs({"a": ("hidden", "ffn")}, hidden=8, data=4) == {"a": jax.P("data", "tensor")}
    assert partition.state_specs({"a": ("hidden", "ffn")}, hidden=8, data=3) == {"a": jax.P(None, "tensor")}
    given = {"a": jax.P(("pipeline", "tensor"), "data"), "b": jax.P("pipeline", None), "c": jax.P()}
    assert (
        partition.mesh_axes(given["a"]) == {"pipeline", "tensor", "data"} and partition.mesh_axes(given["c"]) == set()
    )
    assert partition.dimension(given["a"], "data") == 1 and partition.dimension(given["a"], "tensor") is None
    assert [partition.layers_held(layers, 8) for layers in (70, 64, 65, 1)] == [9, 8, 9, 1]


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (("pipeline", "data", "tensor"), (7, 96, 24), (None, ("data", "pipeline"), "tensor")),  # holds 48 and 6
        (("pipeline", "data", "tensor"), (7, 6, 24), (None, "data", ("tensor", "pipeline"))),  # 3 and 6
        (("pipeline", "data", "tensor"), (7, 6, 40), (None, ("data", "pipeline"), "tensor")),  # 3 and 10
        (("pipeline", "data", "tensor"), (7, 8, 40), (None, "data", "tensor")),  # 4 and 10
        (("pipeline", None, "tensor"), (7, 5, 48), (None, None, ("tensor", "pipeline"))),
        (("pipeline",), (7,), (None,)),
        ((("pipeline", "tensor"), "data"), (12, 6), (("pipeline", "tensor"), "data")),  # shared, so it stays
        ((), (), ()),
    ],
)
def test_an_axis_moves_to_the_largest_dimension_that_it_divides(
    spec: tuple[Any, ...], shape: tuple[int, ...], expected: tuple[Any, ...]
) -> None:
    sizes = {"data": 2, "pipeline": 3, "tensor": 4}
    found = partition.moved("pipeline", [jax.P(*spec)], [jax.ShapeDtypeStruct(shape, "float32")], sizes)
    assert found == [jax.P(*expected)]


def test_parts_by_hand() -> None:
    shapes = {"a": jax.ShapeDtypeStruct((8, 6), "float32"), "b": {"c": jax.ShapeDtypeStruct((5,), "int16")}}
    specs = {"a": jax.P(("pipeline", "tensor"), "data"), "b": {"c": jax.P()}}
    parts = list(partition.parts(shapes, specs, {"data": 3, "pipeline": 2, "tensor": 4}))
    assert parts == [("a", (8, 6), specs["a"], 8), ("b/c", (5,), jax.P(), 10)]


def test_place_cuts_rows_in_order() -> None:
    grid = mesh.build({"data": 1, "pipeline": 1, "tensor": 1})
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(6, 4), "objective": np.arange(6, dtype=np.int32)}
    assert mesh.local_rows(grid, 6, 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    placed = mesh.place(grid, batch, 3)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"].reshape(3, 2, 4))
    np.testing.assert_array_equal(placed["objective"], [[0, 1], [2, 3], [4, 5]])


def test_padded_layers_come_back_bit_equal() -> None:
    params, axes = model.init(SMALL, jax.random.key(0)), model.logical_axes(SMALL)
    padded = partition.pad_layers(params, axes, 2)
    kernel = padded["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.shape == (4, 32, 4, 3, 8) and not kernel[3].any()
    back = partition.true_layers(padded, axes, 3)
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_specs_split_all_of_the_state_of_glm_130b() -> None:
    axes = model.logical_axes(GLM_130B)
    grid = abstract(24, 8, 4)
    specs = bind.state_specs(GLM_130B, grid)
    assert specs["blocks"]["attention"]["qkv"]["kernel"] == jax.P("pipeline", "data", "tensor", None, None)
    assert specs["embedding"]["word"] == jax.P(("pipeline", "tensor"), "data")
    assert partition.specs(axes)["embedding"]["word"] == jax.P(("pipeline", "tensor"), None)
    shapes = jax.eval_shape(lambda: partition.pad_layers(model.init(GLM_130B, jax.random.key(0)), axes, 8))
    parts = list(partition.parts(shapes, specs, dict(grid.shape)))
    assert parts[0].path == "blocks/attention/output/bias" and parts[0].shape == (72, 12288)
    by_name = {part.path: part for part in parts}
    assert by_name["blocks/feedforward/down/kernel"].bytes == 9 * (32768 // 4) * (12288 // 24) * 4
    assert sum(part.bytes for part in parts) == pytest.approx(4 * 128.7e9 / 768, rel=0.03)  # 72 layers for 70


def test_a_hidden_size_that_data_does_not_divide_stays_whole() -> None:
    specs = bind.state_specs(SMALL, abstract(3, 1, 1))
    assert "data" not in {axis for leaf in jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, jax.P))
                          for axis in partition.mesh_axes(leaf)}  # fmt: skip


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(count: int) -> list[dict[str, Any]]:
    """Run tests/parallel/two_processes.py in `count` processes and return what the first one prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    port = str(free_port())
    command = [sys.executable, "-m", "tests.parallel.two_processes", port, str(count)]
    processes = [
        subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for index in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, [error[-2000:] for _, error in outputs]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_two_processes_give_what_one_process_gives() -> None:
    one, two = run_processes(1), run_processes(2)
    assert [result["stages"] for result in two] == [[[0], [1]], [[0, 1], [0, 1]]]  # split over pipeline, then over data
    assert [result["rows"] for result in two] == [16, 8]
    for alone, together in zip(one, two, strict=True):
        np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-6)
        np.testing.assert_allclose(together["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6)
