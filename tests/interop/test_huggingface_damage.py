"""Hugging Face folders that are damaged, or that cannot be written: one line, and nothing half-written."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import CONFIG, DENSE, FILE, GOLDEN, GOLDENS, INDEX, SMALL
from test_sat import noise

from glm_jax.errors import UserError
from glm_jax.interop import convert, huggingface
from glm_jax.interop.weights import open_weights


def test_the_same_files_have_the_same_digest_and_others_another(sharded: Path, tmp_path: Path) -> None:
    whole = open_weights(shutil.copytree(GOLDENS, tmp_path / "copy")).digest
    assert whole == open_weights(GOLDENS).digest != open_weights(GOLDENS / "sharded").digest
    (tmp_path / "copy/README.md").write_text("words")
    assert open_weights(tmp_path / "copy").digest == whole
    root = shutil.copytree(sharded, tmp_path / "sharded")  # whose files may have any names
    index = json.loads((root / INDEX).read_text())
    for name in sorted(set(index["weight_map"].values())):
        (root / name).rename(root / name.replace("model", "part"))
    index["weight_map"] = {tensor: name.replace("model", "part") for tensor, name in index["weight_map"].items()}
    (root / INDEX).write_text(json.dumps(index))
    before = open_weights(root).digest
    file = sorted(root.glob("part*"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert open_weights(root).digest != before


def edit(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    """Make a damage that changes the tensors of the second file."""

    def damage(root: Path) -> None:
        file = sorted(root.glob("*.safetensors"))[1]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def edit_json(name: str, **values: Any) -> Callable[[Path], Any]:
    """Make a damage that sets what a JSON file says."""

    def damage(root: Path) -> None:
        content = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**content, **values}))

    return damage


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Make a damage of the index."""

    def damage(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        change(index["weight_map"])
        (root / INDEX).write_text(json.dumps(index))

    return damage


def edit_header(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Make a damage of the header of the second file, whose length is brought up to date."""

    def damage(root: Path) -> None:
        file = sorted(root.glob("*.safetensors"))[1]
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:end])
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    return damage


def second(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: change(sorted(root.glob("*.safetensors"))[1])


def overlap(header: bytes) -> bytes:
    """Let the second tensor begin where the first does."""
    values = json.loads(header)
    names = [name for name in values if name != "__metadata__"]
    start = values[names[0]]["data_offsets"][0]
    values[names[1]]["data_offsets"][0] = start
    return json.dumps(values).encode()


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (second(lambda file: os.truncate(file, os.path.getsize(file) - 4)), [FILE, "safetensors"]),
    "empty": (second(lambda file: os.truncate(file, 0)), [FILE]),
    "header beyond the file": (
        second(lambda file: file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])),
        [FILE, "safetensors"],
    ),
    "overlapping offsets": (edit_header(overlap), [FILE, "safetensors"]),
    "header of no JSON": (edit_header(lambda header: b"{" + header), [FILE, "safetensors"]),
    "nested header": (edit_header(lambda header: b"[" * 100_000), [FILE, "safetensors"]),
    "no file": (second(lambda file: file.write_bytes(b"no safetensors")), [FILE]),
    "a pipe": (second(lambda file: (file.unlink(), os.mkfifo(file))), [FILE, "missing"]),
    "missing shard": (second(Path.unlink), [FILE, "missing", INDEX]),
    "shape": (edit(lambda tensors: tensors.update({DENSE: tensors[DENSE][:-1]})), [FILE, DENSE, "[7, 8]", "[8, 8]"]),
    "integers": (edit(lambda tensors: tensors.update({DENSE: tensors[DENSE].astype("int8")})), [FILE, DENSE, "I8"]),
    "tensor that the index lacks": (edit(lambda tensors: tensors.update(lm_head=np.zeros(2))), [FILE, "lm_head"]),
    "tensor that the file lacks": (edit(lambda tensors: tensors.pop(DENSE)), [INDEX, FILE, DENSE]),
    "index of another file": (
        edit_index(lambda places: places.update({DENSE: "model-9.safetensors"})),
        ["model-9.safetensors", "missing", INDEX],
    ),
    "index outside": (
        edit_index(lambda places: places.update({DENSE: "../a.safetensors"})),
        [INDEX, "../a.safetensors"],
    ),
    "index with one tensor less": (edit_index(lambda places: places.pop(DENSE)), [INDEX, FILE, DENSE]),
    "index with one tensor more": (
        edit_index(lambda places: places.update(extra=places[DENSE])),
        [INDEX, FILE, "extra"],
    ),
    "index of numbers": (edit_index(lambda places: places.update({DENSE: 7})), [INDEX, "weight_map"]),
    "index without a map": (lambda root: (root / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index of no JSON": (lambda root: (root / INDEX).write_text("{"), [INDEX, "JSON"]),
    "no weights": (lambda root: (root / INDEX).unlink(), ["model.safetensors", "pytorch_model.bin"]),
    "no config": (lambda root: (root / CONFIG).unlink(), [CONFIG, "missing"]),
    "config of no JSON": (lambda root: (root / CONFIG).write_text("model_type: glm"), [CONFIG, "JSON"]),
    "config of bytes": (lambda root: (root / CONFIG).write_bytes(b"\xff\x00"), [CONFIG, "JSON"]),
    "nested config": (lambda root: (root / CONFIG).write_text("[" * 10**6), [CONFIG, "JSON"]),
    "long config": (lambda root: (root / CONFIG).write_text(" " * 2**25), [CONFIG, "bytes"]),
    "list": (lambda root: (root / CONFIG).write_text("[]"), [CONFIG, "object"]),
    "no model type": (lambda root: (root / CONFIG).write_text("{}"), [CONFIG, "model_type is None"]),
    "chatglm": (edit_json(CONFIG, model_type="chatglm"), [CONFIG, "chatglm models have another architecture"]),
    "bert": (edit_json(CONFIG, model_type="bert"), [CONFIG, "model_type is 'bert'"]),
    "glm-4": (edit_json(CONFIG, num_key_value_heads=2), [CONFIG, "GlmForCausalLM"]),
    "relative positions": (edit_json(CONFIG, relative_encoding=True), [CONFIG, "relative_encoding is True"]),
    "one position": (edit_json(CONFIG, block_position_encoding=False), [CONFIG, "block_position_encoding is False"]),
    "spell": (edit_json(CONFIG, spell_length=8), [CONFIG, "spell_length is 8"]),
    "scale": (edit_json(CONFIG, attention_scale=0.5), [CONFIG, "attention_scale is 0.5"]),
    "infinite scale": (edit_json(CONFIG, attention_scale=float("inf")), [CONFIG, "pb_relax is inf"]),
    "large scale": (edit_json(CONFIG, attention_scale=10**400), [CONFIG, "too large"]),
    "relu": (edit_json(CONFIG, hidden_act="relu"), [CONFIG, "hidden_act is 'relu'"]),
    "table": (edit_json(CONFIG, hidden_act={}), [CONFIG, "hidden_act is {}"]),
    "no size": (edit_json(CONFIG, hidden_size=None), [CONFIG, "hidden_size is None"]),
    "bool": (edit_json(CONFIG, num_layers=True), [CONFIG, "num_layers is True"]),
    "many layers": (edit_json(CONFIG, num_layers=10**12), [CONFIG, "num_layers is 1000000000000"]),
    "heads": (edit_json(CONFIG, num_attention_heads=3), [CONFIG, "not divisible"]),
    "negative": (edit_json(CONFIG, vocab_size=-7), [CONFIG, "vocab_size is -7"]),
    "other vocabulary": (edit_json(CONFIG, vocab_size=25), ["glm.word_embeddings.weight", "[24, 8]", "[25, 8]"]),
    "fewer layers": (edit_json(CONFIG, num_layers=1), ["glm.transformer.layers.1.", "not a tensor of this model"]),
    "more layers": (edit_json(CONFIG, num_layers=3), [INDEX, "glm.transformer.layers.2.", "missing"]),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded") / "sharded"
    huggingface.save(root, SMALL, noise(SMALL), max_shard_bytes=5000)
    return root


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_gives_one_line_with_file_and_reason(case: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    root = tmp_path / "folder"
    shutil.copytree(sharded, root)
    huggingface.load(root, huggingface.config(root))
    damage(root)
    with pytest.raises(UserError) as caught:
        weights = open_weights(root)
        convert.to_workdir(weights, tmp_path / "run", convert.experiment(weights.config))
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 500
    for word in words:
        assert word in message
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a": 1}, ["'a' is not a tensor but int"]),
        ([1], ["no table of tensors"]),
    ],
)
def test_a_torch_file_of_something_else_is_refused(content: Any, words: list[str], tmp_path: Path) -> None:
    archives.write(tmp_path / "pytorch_model.bin", archives.dump(content), {})
    with pytest.raises(UserError, match=words[0]):
        huggingface.load(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, {"dtype": "float64"}, ["float64", "float32, float16, bfloat16"]),
        ({"norm": "deepnorm"}, {}, ["model.norm deepnorm", "pre"]),
        ({"position": "rope"}, {}, ["model.position rope", "learned_2d"]),
        ({"activation": "geglu"}, {}, ["model.activation geglu", "gelu or gelu_tanh"]),
        ({"ffn_size": 24}, {}, ["model.ffn_size 24", "32"]),
        ({"norm_epsilon": 1e-6}, {}, ["model.norm_epsilon 1e-06"]),
        ({"embedding_norm": True}, {}, ["model.embedding_norm True"]),
        ({"qk_norm": True}, {}, ["model.qk_norm True"]),
        ({"vocab_size": 25}, {}, ["embedding.word", "[24, 8]", "[25, 8]"]),
    ],
)
def test_save_refuses_what_does_not_fit(
    change: dict[str, Any], options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        huggingface.save(tmp_path / "new/out", dataclasses.replace(SMALL, **change), noise(SMALL), **options)
    for word in words:
        assert word in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_save_overwrites_nothing_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    params = noise(SMALL)
    params["final_norm"]["bias"][3] = -7e4
    with pytest.raises(UserError, match=r"glm\.transformer\.final_layernorm\.bias has the value 70000"):
        huggingface.save(tmp_path / "out", SMALL, params, dtype="float16")
    assert os.listdir(tmp_path) == []
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        huggingface.save(tmp_path, SMALL, params)
    assert os.listdir(tmp_path) == ["precious"]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[huggingface\]'"):
        huggingface.load(GOLDENS / "safetensors", GOLDEN)
