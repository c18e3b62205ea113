"""Quantised weights on disk: the official layout byte for byte, workdirs, and what is refused."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sat import GLM_130B, GOLDENS, SMALL, VARIANTS, assert_equal, noise, raw_tensors, rewrite

from glm_jax.cli import main
from glm_jax.config.fields import to_dict
from glm_jax.errors import UserError
from glm_jax.interop import arrays, convert, layout, sat, sources
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig, apply
from glm_jax.model.quantized import INPUTS, Quantized, Scheme, is_quantized, quantize_params

OFFICIAL = GOLDENS / "glm130b_quantized"
FOLDERS = {f"ckpt_int{bits}_tp{ranks}": (bits, ranks) for bits in (8, 4) for ranks in (1, 2)}
CASES = ("gmask", "mask", "choices", "long", "padded")
EVEN = dataclasses.replace(SMALL, ffn_size=24, hidden_size=32)  # 4 bits can be packed on 1, 2 and 4 ranks
run = jax.jit(apply, static_argnums=0)


def official_tensors(directory: Path, rank: int) -> dict[str, np.ndarray]:
    return {name: array for name, array in raw_tensors(directory, rank).items() if "inv_freq" not in name}


def golden_batch() -> tuple[np.ndarray, ...]:
    """Put the cases into one batch of 64 tokens, so that a model compiles once: tokens, positions, allowed, valid."""
    rows: list[tuple[np.ndarray, ...]] = []
    with np.load(GOLDENS / "glm130b/cases.npz") as found:
        for case in CASES:
            tokens, positions, blocked, valid = (
                found[f"{case}/{name}"] for name in ("tokens", "position_ids", "blocked", "valid")
            )
            batch, length = tokens.shape
            pad = ((0, 0), (0, 64 - length))
            allowed = np.tile(np.eye(64, dtype=bool), (batch, 1, 1))
            allowed[:, :length, :length] = ~blocked
            rows.append((np.pad(tokens, pad), np.pad(positions, pad), allowed, np.pad(valid, pad)))
    return tuple(np.concatenate(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("folder", FOLDERS)
def test_official_files_give_the_official_logits_and_go_out_as_they_came(folder: str, tmp_path: Path) -> None:
    bits, ranks = FOLDERS[folder]
    params = sat.load(OFFICIAL / folder, GLM_130B)
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if isinstance(leaf, Quantized)]
    assert [kernel.bits for kernel in kernels] == [bits] * 4
    tokens, positions, allowed, valid = golden_batch()
    logits = np.asarray(run(GLM_130B, params, tokens, positions, allowed))
    row = 0
    with np.load(OFFICIAL / "quantized_logits.npz") as found:
        for case in CASES:
            expected = found[f"{folder}/{case}/logits"]
            here = np.s_[row : row + len(expected), : expected.shape[1]]
            where = valid[here].astype(bool)
            np.testing.assert_allclose(logits[here][where], expected[where], rtol=0, atol=5e-4)
            row += len(expected)
    sat.save(tmp_path / "out", GLM_130B, params, tensor_parallel=ranks, iteration=1000, dtype="float16")
    for rank in range(ranks):
        ours, golden = (official_tensors(root / "1000", rank) for root in (tmp_path / "out", OFFICIAL / folder))
        assert_equal(ours, golden)
    opened = open_weights(OFFICIAL / folder, to_dict(GLM_130B))
    assert opened.config == GLM_130B
    assert_equal(arrays.load(opened.parameters), params)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_our_converter_writes_what_the_official_one_does(bits: int, ranks: int, tmp_path: Path) -> None:
    given = [f"--config.model.{key}={getattr(GLM_130B, key)}" for key in ("num_heads", "max_length")]
    command = ["convert", "quantize", f"--path={GOLDENS / 'glm130b/ckpt_tp1'}", f"--out={tmp_path / 'out'}"]
    command += [f"--bits={bits}", "--format=sat", f"--tensor_parallel={ranks}", *given]
    assert main.main(command) == 0
    assert (tmp_path / "out/latest").read_text() == "1000"
    for rank in range(ranks):
        golden = official_tensors(OFFICIAL / f"ckpt_int{bits}_tp{ranks}/1000", rank)
        assert_equal(official_tensors(tmp_path / "out/1000", rank), golden)


@pytest.mark.parametrize("cfg, bits", [(EVEN, 4), (dataclasses.replace(VARIANTS[3], hidden_size=32, ffn_size=24), 8)])
def test_every_number_of_ranks_round_trips(
    cfg: GLMConfig, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small chunks and out of order too, for the layouts of both families."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 3000)
    params = jax.tree.map(jnp.asarray, noise(cfg))
    for ranks in (1, 2, 4):
        made = quantize_params(params, Scheme(bits, ranks=ranks))
        sat.save(tmp_path / f"live{ranks}", cfg, made, tensor_parallel=ranks, iteration=0, dtype="float16")
        assert_equal(sat.load(tmp_path / f"live{ranks}", cfg), made)
        read = sources.quantize(arrays.sources(params), Scheme(bits, ranks=ranks))
        sat.write(tmp_path / f"read{ranks}", cfg, read, ranks, 0, "float16")
        for rank in range(ranks):
            assert_equal(*(raw_tensors(tmp_path / f"{name}{ranks}/0", rank) for name in ("live", "read")))
    one = quantize_params(params, Scheme(bits))  # a scale of a whole row is one for each rank, too
    sat.save(tmp_path / "split", cfg, one, tensor_parallel=2, iteration=0, dtype="float16")
    assert_equal(floats(sat.load(tmp_path / "split", cfg)), floats(one))


def floats(params: Any) -> Any:
    """Read every kernel of params as the floats that it stands for."""
    return {path: source.read(tuple(slice(0, size) for size in source.shape), np.dtype(np.float32))
            for path, source in arrays.sources(params).items()}  # fmt: skip


@pytest.mark.parametrize("rounding", ["absmax", "zeropoint"])
@pytest.mark.parametrize("group", [0, 3, 4, 16])
def test_any_region_is_that_of_the_whole(group: int, rounding: Any) -> None:
    """Regions may begin inside bytes and groups; the kernel has two axes of inputs."""
    path, shape = ("blocks", "attention", "output", "kernel"), (2, 4, 6, 5)
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scheme = Scheme(4, group, rounding)
    whole = quantize_params({"blocks": {"attention": {"output": {"kernel": jnp.asarray(kernel)}}}}, scheme)
    live = arrays.sources(whole)[path]
    lazy = sources.quantize({path: sources.Live(jnp.asarray(kernel))}, scheme)[path]
    assert isinstance(live, sources.QuantizedSource) and isinstance(lazy, sources.QuantizedSource)
    everything = live.read(tuple(slice(0, size) for size in shape), np.dtype(np.float32))
    for first, second in (((0, 4), (0, 6)), ((1, 2), (1, 4)), ((1, 4), (3, 5)), ((3, 4), (5, 6))):
        index = (slice(1, 2), slice(*first), slice(*second), slice(2, 5))
        for source in (live, lazy):
            np.testing.assert_array_equal(source.read(index, np.dtype(np.float32)), everything[index])
    for name, part in lazy.parts().items():
        kept = live.parts()[name]
        full = kept.read(tuple(slice(0, size) for size in kept.shape))
        assert part.shape == kept.shape
        for low in itertools.product(*((0, size // 2) for size in part.shape)):
            index = tuple(slice(start, start + (size + 1) // 2) for start, size in zip(low, part.shape, strict=True))
            np.testing.assert_array_equal(part.read(index), full[index])
        last = tuple(slice(size - 1, size) for size in part.shape)  # its byte may begin in an odd group
        np.testing.assert_array_equal(part.read(last), full[last])
    if rounding == "zeropoint" and group == 0:
        with pytest.raises(UserError, match="no zero points"):
            sources.official({path: live}, 1)


@pytest.mark.parametrize(
    "flags, scheme",
    [
        (["--bits=8"], Scheme(8)),
        (["--bits=4", "--group=16"], Scheme(4, 16)),
        (["--bits=4", "--rounding=zeropoint"], Scheme(4, 128, "zeropoint")),
    ],
)
def test_a_workdir_holds_what_is_quantised_in_memory(
    flags: list[str], scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 20000)
    monkeypatch.chdir(tmp_path)
    source = GOLDENS / "glm130b/ckpt_tp2"
    assert (
        main.main(["convert", "quantize", f"--path={source}", "--out=ours", *flags, "--config.model.num_heads=4"]) == 0
    )
    made = quantize_params(sat.load(source, GLM_130B), scheme)
    weights = open_weights("ours")
    assert_equal(arrays.load(weights.parameters), made)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arrays.abstract(weights.parameters)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), made
    )
    record = json.loads((tmp_path / "ours/checkpoints/1000/run/metadata").read_text())["quantized"]
    assert (record["bits"], record["rounding"]) == (scheme.bits, scheme.rounding)
    assert record["groups"]["feedforward.down"] == {0: 176, 16: 16, 128: 88}[scheme.group]
    assert (tmp_path / "ours/checkpoints/1000/params/blocks.attention.qkv.kernel.values/.zarray").is_file()
    convert.orbax_to_sat(open_weights("ours"), "back", 2) if scheme == Scheme(8) else None
    if scheme == Scheme(8):
        assert_equal(floats(sat.load("back", GLM_130B)), floats(made))
        convert.to_workdir(open_weights("back", {"num_heads": 4}), "again", convert.experiment(GLM_130B))
        assert_equal(floats(arrays.load(open_weights("again").parameters)), floats(made))
    else:
        with pytest.raises(UserError, match=r"kernel cannot be written: quantised official checkpoints have no zero"):
            convert.orbax_to_sat(open_weights("ours"), "back", 1)
        assert not Path("back").exists()


def remove_scales(root: Path) -> None:
    tensors = raw_tensors(root / "0", 1)
    del tensors["transformer.layers.1.mlp.dense_4h_to_h.weight_scale"]
    rewrite(root / "0/mp_rank_01_model_states.pt", tensors)


def edit(rank: int, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Make a damage that changes one tensor of the first layer."""

    def damage(root: Path) -> None:
        tensors = raw_tensors(root / "0", rank)
        tensors[f"transformer.layers.0.{name}"] = change(tensors[f"transformer.layers.0.{name}"])
        rewrite(root / f"0/mp_rank_{rank:02d}_model_states.pt", tensors)

    return damage


QKV = "attention.query_key_value"
FLOATS = [edit(rank, "attention.dense.weight", lambda array: array.astype(np.float16)) for rank in (0, 1)]
DAMAGES = {
    "no scales": (remove_scales, ["mp_rank_01", "layers.1.mlp.dense_4h_to_h.weight_scale is missing", "scales"]),
    "width": (
        edit(0, QKV + ".weight", lambda array: array[:, ::2]),
        ["mp_rank_00", "8 bytes for 32", "neither 8 nor 4"],
    ),
    "one float": (lambda root: [of_floats(root) for of_floats in FLOATS], ["mp_rank_00", "is float16", "must be int8"]),
    "a float scale": (edit(0, QKV + ".weight_scale", lambda array: array.astype(np.int8)), ["int8", "of floats"]),
    "short": (edit(1, "mlp.dense_4h_to_h.weight", lambda array: array[:, :-1]), ["mp_rank_01", "[32, 5]", "[32, 6]"]),
    "short scales": (edit(1, "mlp.dense_4h_to_h.weight_scale", lambda array: array[:-1]), ["[31]", "[32]"]),
    "truncated": (
        lambda root: os.truncate(root / "0/mp_rank_01_model_states.pt", 9000),
        ["mp_rank_01_model_states.pt", "zip"],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_quantised_file_is_one_line(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    made = quantize_params(jax.tree.map(jnp.asarray, noise(EVEN)), Scheme(4, ranks=2))
    sat.save(tmp_path / "out", EVEN, made, tensor_parallel=2, iteration=0)
    damage(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        sat.load(tmp_path / "out", EVEN)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    for word in words:
        assert word in message


def scales_of(parameters: dict[Any, Any], part: str, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
    path = (*next(iter(INPUTS)), part)
    array = parameters.pop(path).array
    if change is not None:
        parameters[path] = sources.Live(jnp.asarray(change(array)))


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("scales", None, "attention.qkv.kernel.scales is missing: quantise the model again"),
        ("values", None, "attention.qkv.kernel.values is missing: quantise the model again"),
        ("values", lambda array: array[:, ::2], r"values has shape \[2, 8, 4, 3, 8\], which is neither 8 nor 4 bits"),
        ("scales", lambda array: array[:, :, :1], r"has scales of shape \[2, 1, 1, 3, 8\]"),
        ("scales", lambda array: np.repeat(array, 5, 1), r"has scales of shape \[2, 5, 4, 3, 8\]"),
        ("scales", lambda array: array[:1], r"has scales of shape \[1, 1, 4, 3, 8\]"),
        ("scales", lambda array: array[0], r"has scales of shape \[1, 4, 3, 8\]"),
        ("zeros", lambda array: array[..., :1], r"has scales of shape \[2, 1, 4, 3, 1\]"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(part: str, change: Any, words: str) -> None:
    made = quantize_params(jax.tree.map(jnp.asarray, noise(EVEN)), Scheme(4, rounding="zeropoint"))
    flat: dict[Any, Any] = sources.split(arrays.sources(made))
    assert sources.join(flat, arrays.model_shapes(EVEN), "here").keys() == arrays.model_shapes(EVEN).keys()
    scales_of(flat, part, change)
    with pytest.raises(UserError, match=words):
        sources.join(flat, arrays.model_shapes(EVEN), "here")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--bits"),
        (["--bits=3"], "weights of 3 bits are not supported: choose 8 or 4"),
        (["--bits=8", "--rounding=up"], "rounding 'up' is unknown"),
        (["--bits=8", "--tensor_parallel=2"], "--tensor_parallel is for --format=sat"),
        (["--bits=4", "--format=sat", "--group=32"], "leave --group and --rounding out"),
        (["--bits=4", "--format=sat", "--rounding=zeropoint"], "leave --group and --rounding out"),
        (["--bits=8", "--format=sat", "--tensor_parallel=3"], "3 tensor-parallel ranks do not divide"),
        (["--bits=4", "--format=sat", "--tensor_parallel=4"], "ffn_size is 5 on a rank: use 8 bits"),
    ],
)
def test_the_command_refuses_in_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(SMALL, ffn_size=20)
    sat.save("sat", cfg, noise(cfg), tensor_parallel=1, iteration=3)
    given = ["--config.model.num_heads=4"]
    assert main.main(["convert", "quantize", "--path=sat", "--out=out", *given, *flags]) == 2
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["sat"]


def test_what_is_quantised_is_not_quantised_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["convert", "quantize", f"--path={OFFICIAL / 'ckpt_int8_tp2'}", "--out=out", "--bits=4"]
    assert main.main([*command, "--config.model.num_heads=4"]) == 2
    assert "has 8 bits already: quantise the weights that it came from" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from glm_jax.interop import arrays, sat
from glm_jax.interop.shards import open_parameters
from glm_jax.model import GLMConfig, logical_axes, quantized
from glm_jax.parallel import partition
path, cfg = sys.argv[1], GLMConfig(2, 32, 4, 24, 40)
mesh = jax.make_mesh((1, 1, 4), ("data", "pipeline", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
axes = quantized.logical_axes(logical_axes(cfg), arrays.abstract(open_parameters(path, cfg)))
specs = partition.specs(axes)
sharded, whole = sat.load_sharded(path, cfg, partition.shardings(mesh, specs)), sat.load(path, cfg)
kernels = [tree["blocks"]["feedforward"]["down"]["kernel"] for tree in (sharded, whole)]
kernel, of_kernel = kernels[0], specs["blocks"]["feedforward"]["down"]["kernel"]
x = jax.random.normal(jax.random.key(0), (2, 3, 24))

def multiply(x, kernel):
    layer = jax.tree.map(lambda array: array[1], kernel)
    return jax.lax.psum(quantized.einsum("bsf,fd->bsd", x, layer), ("pipeline", "tensor"))

split = jax.shard_map(multiply, mesh=mesh, in_specs=(jax.P(None, None, "tensor"), of_kernel), out_specs=jax.P())
wanted = jnp.einsum("bsf,fd->bsd", x, quantized.dequantize(kernels[1], jnp.float32)[1])
print(json.dumps({"scales": kernel.scales.shape, "values": kernel.values.addressable_shards[0].data.shape,
                  "part": kernel.scales.addressable_shards[0].data.shape,
                  "error": float(np.abs(np.asarray(jax.jit(split)(x, kernel)) - np.asarray(wanted)).max())}))
"""


@pytest.mark.slow
@pytest.mark.oldest
def test_two_ranks_load_onto_a_mesh_of_four(tmp_path: Path) -> None:
    made = quantize_params(jax.tree.map(jnp.asarray, noise(EVEN)), Scheme(4, ranks=2))
    sat.save(tmp_path / "out", EVEN, made, tensor_parallel=2, iteration=0)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(tmp_path / "out")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output)
    assert found.pop("error") < 1e-4
    assert found == {"scales": [2, 4, 32], "values": [2, 3, 32], "part": [2, 1, 32]}
