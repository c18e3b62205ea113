"""Weights wherever they are, see places.py: their arrays stay on disk until they are read."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from glm_jax.config import Experiment
from glm_jax.config.fields import build, definitions, local_path
from glm_jax.data.tokenizers.load import load, read
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.interop import arrays, describe, huggingface, places, shards, sources
from glm_jax.interop.sources import Adapted, Source
from glm_jax.model import GLMConfig
from glm_jax.parallel import processes
from glm_jax.storage import digests
from glm_jax.types import Json
from glm_jax.workdir import checkpoint_folders, folder
from glm_jax.workdir.checkpoint_format import ADAPTERS, PARAMS, RUN, ParamPath, open_params

Given = Mapping[str, object]  # what the user says of a model, by key of the section `model`
Say = Callable[[str], None]

SIZES = ("num_layers", "hidden_size", "num_heads", "ffn_size")
# Keys under which the same arrays give other logits, or have other shapes. A vocabulary and a table may be resized.
DECISIVE = (*SIZES, "norm", "position", "activation", "embedding_norm", "qk_norm", "norm_epsilon", "rope_base")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Params that are still on disk.

    Attributes:
        kind: what the path was recognised as.
        path: the workdir, or the folder that the user named.
        config: the model that they are of.
        parameters: the arrays by path into params, in the shapes of `glm_jax.model.init`. A quantised kernel is a
            `QuantizedSource`: `arrays.load` keeps it so, and everything else reads it as floats.
        step: of the run that made them; None if the folder's name is no number.
        tokenizer: the file beside them; None if there is none.
        files: the folder, and the start of the names, of the files that hold the arrays.
    """

    kind: places.Kind
    path: Path
    config: GLMConfig
    parameters: Mapping[ParamPath, Source]
    step: int | None
    tokenizer: Path | None
    files: tuple[Path, str]

    @functools.cached_property
    def digest(self) -> str:
        """One sha256 of the files that hold the arrays; those of an official checkpoint are read for it."""
        directory, under = self.files
        try:
            return digests.identity(directory, under)
        except OSError as error:
            raise UserError(f"{directory} cannot be read ({error.strerror}): bring it back") from error

    def read_tokenizer(self) -> Tokenizer | None:
        """Read the tokenizer beside the weights; None if there is none.

        Raises:
            UserError: the file is damaged, or is of another family.
        """
        if self.tokenizer is None:
            return None
        return load(self.tokenizer) if self.kind == "workdir" else read(self.tokenizer, pinned=False)

    def record(self) -> Json:
        """Return what is recorded of the weights where something is made of them."""
        return {"kind": self.kind, "path": str(self.path.absolute()), "step": self.step, "digest": self.digest}


def warn(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr)


def open_weights(path: str | Path, given: Given = MappingProxyType({}), say: Say = warn) -> Weights:
    """Open weights without reading them. In a run of several processes all must call this.

    Args:
        path: see places.py. Of a workdir without a step, the newest good checkpoint is taken.
        given: what the user says of the model. It must not contradict what the files show; where they show nothing,
            it decides.
        say: called with a line about every damaged checkpoint that is skipped.

    Raises:
        UserError: nothing that can be read lies there, it is damaged, is of another model than `given`, or does not
            show a key that `given` lacks.
    """
    place = places.find(path)
    if place.kind == "sat":
        return _open_sat(place.root, given)
    if place.kind == "huggingface":
        return _open_huggingface(place.root, given)
    if place.kind == "workdir":
        return _open_workdir(place.root, place.step, given, say)
    return _open_step(place.root, place.step or place.root, given)


def _open_sat(root: Path, given: Given) -> Weights:
    ranks = shards.open_ranks(root)
    file, tensors = ranks[0]
    config = describe.model(root, file, describe.shapes(file, tensors, len(ranks), shards.bits(ranks)), given)
    name = shards.latest_iteration(root)
    step = int(name) if name.isdecimal() else None
    return Weights("sat", root, config, shards.join(ranks, config), step, None, (root / name, "mp_rank_"))


def _open_huggingface(root: Path, given: Given) -> Weights:
    config = huggingface.config(root)
    for activation in ("gelu", "gelu_tanh"):  # the folder does not tell with which of them it was trained
        if given.get("activation") == activation:
            config = dataclasses.replace(config, activation=activation)
    _check_given(root, config, given)
    parameters = huggingface.open_parameters(root, config)
    return Weights("huggingface", root, config, parameters, 0, huggingface.tokenizer_file(root),
                   huggingface.weight_files(root))  # fmt: skip


def _check_given(root: Path, config: GLMConfig, given: Given) -> None:
    """Compare what the user says of a model with the weights' own config."""
    for key in DECISIVE:
        if given.get(key, value := getattr(config, key)) != value:
            raise describe.differs(root, key, (value,), given[key])


def _open_workdir(root: Path, step: Path | None, given: Given, say: Say) -> Weights:
    experiment, directory = folder.read_config(root), root / "checkpoints"
    steps = checkpoint_folders.folders(directory) if step is None else [int(step.name)]
    adapted = experiment.train.lora.rank > 0
    item = ADAPTERS if adapted else PARAMS
    good, _ = checkpoint_folders.newest_good(directory, steps, f"{item}/", say)
    if good is None:
        raise UserError(f"{root} holds no finished checkpoint yet")
    parameters = (
        _merged(root, experiment, directory / str(good), say) if adapted else open_params(directory / str(good))
    )
    model = dataclasses.replace(experiment.model, vocab_size=_rows(root, parameters))
    config = model.glm(0, experiment.data.seq_length)
    _check_given(root, config, given)
    tokenizer = root / folder.TOKENIZER
    return _checked(Weights("workdir", root, config, parameters, good, tokenizer if tokenizer.is_file() else None,
                            (directory / str(good), f"{item}/")))  # fmt: skip


def open_recorded(record: Json, named: str, given: Given = MappingProxyType({}), say: Say = warn) -> Weights:
    """Open the weights of a `Weights.record`: the same step, though there may be newer ones. All processes must call.

    Args:
        record: what adapters were trained for.
        named: `train.init_from`, where they may lie by now if they are not where they were.
        given, say: as in `open_weights`.

    Raises:
        UserError: they cannot be opened, or are others by now.
    """
    root = Path(record["path"])
    if not root.exists():
        root, _ = places.split(local_path(named, "train.init_from"))
    weights = open_weights(f"{root}@{record['step']}" if record["kind"] == "workdir" else root, given, say)
    if processes.is_first() and weights.digest != record["digest"]:  # which may read all of an official checkpoint
        raise UserError(f"{root} has changed since the adapters were trained for it: restore it")
    processes.wait_for_all()
    return weights


def _merged(root: Path, experiment: Experiment, step: Path, say: Say) -> dict[ParamPath, Source]:
    """Return the params of a run's base with the adapters of a step merged into them as they are read."""
    record = json.loads((step / RUN / "metadata").read_text("utf-8"))["base"]
    try:
        base = open_recorded(record, experiment.train.init_from, say=say)
    except UserError as error:
        raise UserError(f"{root} holds adapters, whose base is not as it was: {error}") from error
    adapters, scale = open_params(step, ADAPTERS), experiment.train.lora.alpha / experiment.train.lora.rank
    return {
        path: Adapted(source, adapters[(*path, "a")], adapters[(*path, "b")], scale)
        if (*path, "a") in adapters
        else source
        for path, source in base.parameters.items()
    }


def _open_step(root: Path, directory: Path, given: Given) -> Weights:
    if any(directory.glob("digests-*")) and (damage := digests.damage(directory, f"{PARAMS}/")):
        raise UserError(f"{directory} is damaged ({damage}): bring it back, or name another step's folder")
    if not set(SIZES) <= given.keys():
        raise UserError(f"{directory} does not say which model it holds: give --config EXPERIMENT")
    parameters = open_params(directory)
    values = {one.name: given[one.name] for one in definitions(GLMConfig) if one.name in given}
    if (table := parameters.get(("embedding", "position"))) is not None:
        values["max_length"] = table.shape[0]
    config = build(GLMConfig, {**values, "vocab_size": _rows(directory, parameters)}, "model.")
    step = int(directory.name) if directory.name.isdecimal() else None
    return _checked(Weights("orbax", directory, config, parameters, step, None, (directory, f"{PARAMS}/")))


def _rows(where: Path, parameters: Mapping[ParamPath, Source]) -> int:
    """Return the number of rows of the embedding."""
    if ("embedding", "word") not in parameters:
        raise UserError(f"{where}: embedding.word is missing: these are not the params of a GLM")
    return parameters["embedding", "word"].shape[0]


def _checked(weights: Weights) -> Weights:
    """Put the parts of quantised kernels together, and compare the arrays' shapes with the config."""
    where = str(weights.files[0] / PARAMS)
    parameters = sources.join(weights.parameters, arrays.model_shapes(weights.config), where)
    arrays.check_shapes(weights.config, {path: tuple(source.shape) for path, source in parameters.items()}, where)
    return dataclasses.replace(weights, parameters=parameters)
