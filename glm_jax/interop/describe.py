"""Which model an official SAT checkpoint holds: from its tensors, its model_config.json, and what the user says.

Names and shapes show most of it. They do not show the number of heads, rotary positions or ALiBi, the place of the
layer norms (unless there are four), or which GELU it is: here a file in the folder, the user, and the published models
say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from glm_jax.config.fields import build, definitions, is_mapping
from glm_jax.errors import UserError
from glm_jax.interop.layout import SAT_NORMS
from glm_jax.interop.torch_archive import StoredTensor
from glm_jax.model import GLMConfig
from glm_jax.storage.files import open_regular
from glm_jax.types import Json

CONFIG_FILES = ("model_config.json", "config.json")  # what SAT writes beside `latest`, under its newer and older name
CONFIG_BYTES = 2**20  # more is no config
LENGTH = 2048  # of a row, where nothing says it: GLM-130B's
# Heads by (layers, hidden size) of the published models: those of experiments/glm_*.py
HEADS = {(12, 768): 12, (24, 1024): 16, (30, 1024): 16, (30, 1152): 18, (36, 2048): 32, (48, 4096): 64,
         (70, 12288): 96}  # fmt: skip


class Fact(NamedTuple):
    """What is known of one key of a model."""

    options: tuple[object, ...]  # the values that are possible; () is any
    default: object = None  # the one to take if nobody says; None: somebody must


def shapes(file: Path, tensors: Mapping[str, StoredTensor], ranks: int, bits: int = 0) -> dict[str, Fact]:
    """Return what the names and shapes of one rank's tensors show, by key of the model.

    Args:
        file: that holds them, for messages.
        tensors: by official name.
        ranks: the number of tensor-parallel ranks.
        bits: of the kernels, 4 of them two to a byte; 0 for floats.

    Raises:
        UserError: the tensors are not those of a GLM.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"{file}: {name} is missing or not a matrix: is this a GLM?")
        return tensors[name].shape

    layers = [int(match[1]) for name in tensors if (match := re.match(r"transformer\.layers\.(\d+)\.", name))]
    vocab, hidden = shape("transformer.word_embeddings.weight")
    rows, inner = (shape("transformer.layers.0.mlp." + name)[axis] for name, axis in
                   (("dense_h_to_4h.weight", 0), ("dense_4h_to_h.weight", 1)))  # fmt: skip
    inner *= 2 if bits == 4 else 1
    known = {"num_layers": 1 + max(layers), "hidden_size": hidden, "ffn_size": inner * ranks,
             "vocab_size": vocab * ranks}  # fmt: skip
    facts = {key: Fact((value,), value) for key, value in known.items()}
    facts["num_heads"] = Fact((), HEADS.get((1 + max(layers), hidden)))
    learned, gated = "transformer.position_embeddings.weight" in tensors, rows == 2 * inner
    facts["activation"] = Fact(("geglu",), "geglu") if gated else Fact(("gelu_tanh", "gelu"), "gelu_tanh")
    if learned:
        table = shape("transformer.position_embeddings.weight")[0]
        facts |= {"position": Fact(("learned_2d",), "learned_2d"), "max_length": Fact((table,), table)}
    else:
        facts |= {"position": Fact(("rope", "alibi"), "rope"), "max_length": Fact((), LENGTH)}
    if "transformer.layers.0.third_layernorm.weight" in tensors:
        facts["norm"] = Fact(("sandwich",), "sandwich")
    else:  # the original GLM's, or GLM-130B's; other families are not published
        usual = "pre" if learned and not gated else "deepnorm" if gated and not learned else None
        facts["norm"] = Fact(tuple(norm for norm in SAT_NORMS if norm != "sandwich"), usual)
    return facts


def model(root: Path, file: Path, facts: Mapping[str, Fact], given: Mapping[str, object]) -> GLMConfig:
    """Return the config of a checkpoint.

    Args:
        root: its folder.
        file: whose tensors gave the facts.
        facts: from `shapes`.
        given: what the user says of the model, by key, complete or not.

    Raises:
        UserError: the folder's file, the tensors and the user contradict one another, or none of them says a key.
    """
    facts = _declared(root, file, facts)
    values: Json = {one.name: given[one.name] for one in definitions(GLMConfig) if one.name in given}
    for key, fact in facts.items():
        value = given.get(key, fact.default)
        if value is None:
            raise UserError(f"{root} does not show its {key}: give --config.model.{key}=VALUE, or --config EXPERIMENT")
        if fact.options and value not in fact.options:
            raise differs(root, key, fact.options, value)
        values[key] = value
    return build(GLMConfig, values, "model.")


def differs(where: Path, key: str, options: tuple[object, ...], value: object) -> UserError:
    """Return the error for weights of another model than the user says."""
    shown = " or ".join(map(repr, options))
    return UserError(f"{where} holds a model with {key} {shown}, not model.{key}={value!r}: set it so, or name other "
                     "weights")  # fmt: skip


def read_json(path: Path) -> Json:
    """Read a small JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(CONFIG_BYTES + 1)
        found = json.loads(content) if len(content) <= CONFIG_BYTES else None
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: bring it back") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): let this user read it") from error
    except (ValueError, RecursionError):  # ValueError: neither JSON nor UTF-8
        found = None
    if not is_mapping(found):
        raise UserError(
            f"{path} should hold a JSON object of up to {CONFIG_BYTES:,} bytes and does not: fetch it again"
        )
    return dict(found)


def _declared(root: Path, file: Path, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """Return the facts with what the folder's own config adds, if there is one."""
    path = next((root / name for name in CONFIG_FILES if (root / name).is_file()), None)
    if path is None:
        return dict(facts)
    found, added = read_json(path), dict(facts)
    names = {"num_layers": "num_layers", "hidden_size": "hidden_size", "inner_hidden_size": "ffn_size",
             "num_attention_heads": "num_heads"}  # fmt: skip
    for name, key in names.items():
        if (value := found.get(name)) is None:
            continue
        if facts[key].options and value not in facts[key].options:
            raise UserError(
                f"{path} says {name}={value!r}, but {file} has {facts[key].options[0]!r}: correct the config"
            )
        added[key] = Fact((value,), value)
    if (length := found.get("max_sequence_length")) is not None and not facts["max_length"].options:
        added["max_length"] = Fact((), length)
    if (epsilon := found.get("layernorm_epsilon")) is not None:
        added["norm_epsilon"] = Fact((epsilon,), epsilon)
    order = found.get("layernorm_order")
    # GLM-130B's says "post", and its class makes DeepNorm of that
    if order in facts["norm"].options and not (order == "post" and facts["norm"].default == "deepnorm"):
        added["norm"] = Fact((order,), order)
    return added
