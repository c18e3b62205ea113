"""Folders of the original GLM as Hugging Face's classes write them, to and from params.

    FOLDER/config.json                            model_type "glm"
    FOLDER/model.safetensors                      one file,
    FOLDER/model-00001-of-00002.safetensors ...   or several
    FOLDER/model.safetensors.index.json           with an index: {"weight_map": {tensor: file}}

pytorch_model.bin, -00001-of-00002.bin and .bin.index.json in the same way. The released folders (glm-large,
glm-10b-chinese and others; docs/weights.md lists them) hold the tensors of the training code's checkpoints under other
names: layout.py has both.

The released class GLMForConditionalGeneration computes the exact GELU (erf), the training code that made the weights
its tanh approximation. `config` says "gelu", so that logits are those of the class; the weights were trained with
"gelu_tanh", which `dataclasses.replace(cfg, activation="gelu_tanh")` chooses. Both take the same params.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from glm_jax.config.fields import shown
from glm_jax.errors import UserError
from glm_jax.interop import arrays
from glm_jax.interop.describe import read_json
from glm_jax.interop.layout import HUGGING_FACE
from glm_jax.interop.places import CONFIG, WEIGHTS
from glm_jax.interop.safetensors_file import read_safetensors, write_safetensors
from glm_jax.interop.shards import Parameter, Rank, check_tensors, gather
from glm_jax.interop.sources import Source
from glm_jax.interop.torch_archive import StoredTensor, TensorStream, read_archive
from glm_jax.model import GLMConfig
from glm_jax.model.transformer import Params
from glm_jax.storage.files import atomic_directory, check_absent, write_atomic
from glm_jax.types import Json, Tree
from glm_jax.workdir.checkpoint_format import ParamPath

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "cog-pretrain.model")
DTYPES = ("float32", "float16", "bfloat16")  # that are written
MAX_SHARD_BYTES = 5 * 10**9
MAX_LAYERS = 10_000  # each makes names of tensors
PREFIX = "glm."  # of every tensor; GLMModel, the class without a head, leaves it out

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length")
# what the classes can vary and we cannot, with the only value that we have; left out, it has that value
FIXED = {"relative_encoding": False, "block_position_encoding": True, "spell_length": None}
# transformers' names. The released class always computes "gelu"; the key keeps what a model of ours was trained with
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh"}


def config(path: str | Path) -> GLMConfig:
    """Read the architecture in config.json.

    Dropout, which belongs to training, is left at 0. A position table has max_sequence_length + 1 rows.

    Raises:
        UserError: config.json is missing, unreadable, of another architecture, or of a variant that we do not have.
    """
    file = Path(path) / CONFIG
    values = read_json(file)
    _check_type(file, values)
    for name, fixed in FIXED.items():
        if values.get(name, fixed) is not fixed:
            raise UserError(f"{file}: {name} is {shown(values[name])}: only {fixed} is read")
    for name in SIZES:
        if type(values.get(name)) is not int:
            raise UserError(f"{file}: {name} is {shown(values.get(name))}, it must be a whole number")
    if values["num_layers"] > MAX_LAYERS:
        raise UserError(f"{file}: num_layers is {shown(values['num_layers'])}, at most {MAX_LAYERS} are read")
    scale = values.get("attention_scale", 1.0)
    if type(scale) not in (int, float) or not scale >= 1:
        raise UserError(f"{file}: attention_scale is {shown(scale)}, it must be a number from 1 on")
    activation = values.get("hidden_act", "gelu")
    if activation not in list(ACTIVATIONS):
        raise UserError(f"{file}: hidden_act is {shown(activation)}, it must be one of {', '.join(ACTIVATIONS)}")
    try:
        return GLMConfig(
            values["num_layers"],
            values["hidden_size"],
            values["num_attention_heads"],
            4 * values["hidden_size"],
            values["vocab_size"],
            values["max_sequence_length"] + 1,
            norm="pre",
            position="learned_2d",
            activation="gelu" if activation == "gelu" else "gelu_tanh",
            pb_relax=float(scale) if scale > 1 else 0.0,
        )
    except (ValueError, OverflowError) as error:
        raise UserError(f"{file}: {error}") from error


def _check_type(file: Path, values: Json) -> None:
    """Refuse models of other classes, those that share a name with GLM by name."""
    kind = values.get("model_type")
    if kind == "chatglm":
        raise UserError(
            f"{file}: model_type is 'chatglm': chatglm models have another architecture (rotary positions in two "
            "halves, or multi-query attention and RMS norm); only 'glm' is read"
        )
    if kind != "glm":
        raise UserError(
            f"{file}: model_type is {shown(kind)}, only 'glm' is read: is this a folder of the original GLM?"
        )
    if "num_key_value_heads" in values:
        raise UserError(
            f"{file}: it has num_key_value_heads: GLM-4 models (GlmForCausalLM) have another architecture; only "
            "those of GLMForConditionalGeneration are read"
        )


def load(path: str | Path, cfg: GLMConfig) -> Params:
    """Load a folder onto the default device.

    Args:
        path: the folder with config.json and weights, float32, float16, bfloat16 or float64.
        cfg: the model that it holds, as `config` gives it.

    Returns:
        float32 params as `glm_jax.model.init` gives them.

    Raises:
        UserError: a missing or damaged file, or one that the index does not fit; a tensor that is missing, unknown or
            of another shape than cfg's; cfg is not of the original GLM's architecture.
    """
    return arrays.load(open_parameters(path, cfg))


def load_sharded(path: str | Path, cfg: GLMConfig, shardings: Tree) -> Params:
    """Load a folder onto a mesh, reading of the files what this process's devices hold.

    Beyond the arrays themselves the host needs memory for one chunk.

    Args:
        path, cfg: as in `load`.
        shardings: a jax Sharding for each array, nested as params.

    Raises:
        UserError: as in `load`.
    """
    return arrays.load(open_parameters(path, cfg), shardings)


def weight_files(path: str | Path) -> tuple[Path, str]:
    """Return the folder of the files that hold the weights, and how their names start.

    Raises:
        UserError: there are none.
    """
    file = _weights(Path(path))
    return file.parent, file.name if file.name in WEIGHTS else os.path.commonprefix([*_places(file).values()])


def tokenizer_file(path: str | Path) -> Path | None:
    """Return the file of a folder's tokenizer, None if there is none; files of its special tokens lie beside it."""
    return next((Path(path) / name for name in TOKENIZERS if (Path(path) / name).is_file()), None)


def open_parameters(path: str | Path, cfg: GLMConfig) -> dict[ParamPath, Parameter]:
    """Open a folder as params that are still on disk, by path; everything that can be checked is.

    Raises:
        UserError: as in `load`.
    """
    _check_model(cfg)
    return gather([_open(Path(path))], cfg, HUGGING_FACE)


def _check_model(cfg: GLMConfig) -> None:
    """Refuse models that the released classes do not compute."""
    wanted = {"norm": ("pre",), "position": ("learned_2d",), "activation": tuple(ACTIVATIONS.values()),
              "embedding_norm": (False,), "qk_norm": (False,), "ffn_size": (4 * cfg.hidden_size,),
              "norm_epsilon": (1e-5,)}  # fmt: skip
    for name, choices in wanted.items():
        if getattr(cfg, name) not in choices:
            listed = " or ".join(map(str, choices))
            raise UserError(
                f"Hugging Face's GLM has no model.{name} {getattr(cfg, name)}: it must be {listed}; the SAT format has "
                "more kinds of models"
            )


def _open(folder: Path) -> Rank:
    """Open the tensors of a folder, by their full names."""
    file = _weights(folder)
    return Rank(file, _full_names(_read_tensors(file) if file.name in WEIGHTS else _read_shards(file)))


def _weights(folder: Path) -> Path:
    """Return the file of a folder's weights, or the index of several."""
    for name in WEIGHTS:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.exists():
                return file
    listed = ", ".join(f"{name}, {name}.index.json" for name in WEIGHTS)
    raise UserError(f"{folder} has no weights: one of {listed} must be in it")


def _full_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    if any(name.startswith(PREFIX) for name in tensors):
        return tensors
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def _read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Open one file of tensors by name."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    content = read_archive(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: it is no table of tensors by name: did save_pretrained write it?")
    return check_tensors(file, content)


def _places(index: Path) -> dict[str, str]:
    """Return the names of files by tensor, as an index has them."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f'{index}: there is no "weight_map" in it, a table from tensors to files')
    return places


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    """Open the files that an index names, whose tensors must be those that it says."""
    places = _places(index)
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    files = sorted(set(places.values()))
    for name in files:
        if not re.fullmatch(rf"[\w.-]{{1,200}}{re.escape(suffix)}", name):
            raise UserError(f"{index} names {shown(name)}, which is no {suffix} file beside it")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing: {index.name} names it")
    tensors = {}
    for name in files:
        found = _read_tensors(index.parent / name)
        wanted = {tensor for tensor, place in places.items() if place == name}
        for tensor in sorted(wanted - found.keys()):
            raise UserError(f"{index} says that {shown(tensor)} is in {name}, which does not have it")
        for tensor in sorted(found.keys() - wanted):
            raise UserError(f"{index.parent / name} has {shown(tensor)}, but {index.name} does not say so")
        tensors |= found
    return tensors


def save(
    path: str | Path, cfg: GLMConfig, params: Params, *, dtype: str = "float32", max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write params as a folder of safetensors with config.json, which appears whole or not at all.

    transformers reads it once configuration_glm.py and modeling_glm.py of a released folder lie beside. The released
    class computes "gelu" whatever cfg's activation is; `config` reads back which it was.

    Args:
        path: a folder that does not exist yet (or is empty).
        cfg: the model.
        params: as `glm_jax.model.init` gives them.
        dtype: "float32", "float16" or "bfloat16".
        max_shard_bytes: tensors of more than this in all are written as several files and an index.

    Raises:
        UserError: the path is taken, the model is not of the original GLM's architecture, params do not fit cfg, or a
            value does not fit dtype.
    """
    write(path, cfg, arrays.sources(params), dtype, max_shard_bytes)


def write(
    path: str | Path,
    cfg: GLMConfig,
    sources: Mapping[ParamPath, Source],
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Do the work of `save` for anything that is read region by region."""
    root = Path(path)
    check_absent(root)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    _check_model(cfg)
    shards = _divide(arrays.streams(cfg, sources, dtype, layout=HUGGING_FACE), max_shard_bytes)
    stem, suffix = Path(WEIGHTS[0]).stem, Path(WEIGHTS[0]).suffix
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    with atomic_directory(root) as directory:
        write_atomic(directory / CONFIG, json.dumps(_describe(cfg, dtype), indent=2) + "\n")
        if len(shards) == 1:
            write_safetensors(directory / WEIGHTS[0], shards[0])
            return
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(directory / name, shard)
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomic(directory / f"{WEIGHTS[0]}.index.json", json.dumps(index, indent=2) + "\n")


def _divide(tensors: Mapping[str, TensorStream], limit: int) -> list[dict[str, TensorStream]]:
    """Divide tensors, in their order, into shards of at most `limit` bytes; a larger tensor has one of its own."""
    shards: list[dict[str, TensorStream]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _describe(cfg: GLMConfig, dtype: str) -> Json:
    """Return config.json, with every field that the released classes read."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["GLMForConditionalGeneration"],
        "attention_dropout_prob": cfg.attention_dropout,
        "attention_scale": max(1.0, cfg.pb_relax),
        "auto_map": {
            "AutoConfig": "configuration_glm.GLMConfig",
            "AutoModel": "modeling_glm.GLMModel",
            "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
        },
        "checkpoint_activations": False,
        "checkpoint_num_layers": 1,
        "embedding_dropout_prob": cfg.hidden_dropout,
        "hidden_act": activations[cfg.activation],
        "hidden_size": cfg.hidden_size,
        "initializer_range": 0.02,
        "max_sequence_length": cfg.max_length - 1,
        "model_type": "glm",
        "num_attention_heads": cfg.num_heads,
        "num_layers": cfg.num_layers,
        "output_dropout_prob": cfg.hidden_dropout,
        "output_predict": True,
        "parallel_output": True,
        "pool_token": "cls",
        "spell_func": "lstm",
        "torch_dtype": dtype,
        "vocab_size": cfg.vocab_size,
        **FIXED,
    }
