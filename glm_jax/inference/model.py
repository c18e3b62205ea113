"""A trained model on a mesh: opened from a workdir, it fills blanks and scores texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import jax

from glm_jax.config.fields import local_path
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.engine import weights as engine_weights
from glm_jax.engine.weights import DecodeConfig
from glm_jax.errors import UserError
from glm_jax.inference import fill, prompts, scoring, strategies
from glm_jax.inference.batch import Decoder
from glm_jax.inference.pending import Filled, Settings
from glm_jax.inference.quantize import scheme
from glm_jax.inference.scoring import Scored
from glm_jax.interop import decoding, sources
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig
from glm_jax.model.quantized import Scheme
from glm_jax.parallel import mesh as meshes
from glm_jax.types import Tree
from glm_jax.workdir import folder

Dtype = Literal["float32", "float16", "bfloat16"]
Mesh = Mapping[str, int] | jax.sharding.Mesh  # the sizes of axes, 1 where not named; or a mesh
Many = list[str] | tuple[str, ...]
WIDTHS = {"int8": 8, "int4": 4}  # bits
DTYPES = ("float32", "float16", "bfloat16")


class Model:
    """A model and its tokenizer, on a mesh. In a run of several processes all must make the same calls.

    Attributes:
        config: of the model.
        tokenizer: None if the weights were converted without one; then no text can be filled or scored.
        decoder: the weights on the mesh.
        step: of the checkpoint that was opened; None if there was none, or it says none.
    """

    def __init__(
        self,
        config: GLMConfig,
        params: Tree,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
        *,
        dtype: Dtype = "float32",
        source: str = "the model",
    ) -> None:
        """Take params that are in memory, such as those of a run.

        Args:
            config: the model.
            params: as `glm_jax.model.init` returns them, on any mesh.
            tokenizer: of the model.
            mesh: where to compute, sizes of the axes `data`, `pipeline` and `tensor` or a jax Mesh; None is one device.
            dtype: of the computation.
            source: where the params come from, for messages.

        Raises:
            UserError: the model does not fit the mesh.
        """
        decode = _decode_config(config, tokenizer, dtype)
        on = _mesh(mesh)
        self.config, self.tokenizer = config, tokenizer
        self.step: int | None = None
        self.decoder = Decoder(decode, on, engine_weights.place(decode, on, params), source)

    @classmethod
    def open(
        cls,
        workdir: str | Path,
        mesh: Mesh | None = None,
        dtype: Dtype | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        step: int | None = None,
    ) -> Model:
        """Open a checkpoint of a workdir, each device reading its own part.

        Args:
            workdir: of a run, or written by `convert`.
            mesh: as for `Model`.
            dtype: of the computation. None is float32 on CPU, and what the run trained with elsewhere.
            quantize: hold the kernels of blocks as integers, int8 by row or int4 by groups of up to 128 input features.
                A workdir that `convert quantize` wrote is so without it.
            step: of the checkpoint; None is the newest good one.

        Raises:
            UserError: the workdir is a URL, or holds no run, no checkpoint, or none with good params; or the model does
                not fit the mesh, or is quantised already.
        """
        workdir = local_path(workdir, "the workdir")
        experiment = folder.read_config(workdir)
        tokenizer = None if folder.lacks_tokenizer(workdir) else folder.read_tokenizer(workdir)
        opened = open_weights(workdir if step is None else f"{workdir}@{step}")
        on = _mesh(mesh)
        usual = "float32" if on.devices.flat[0].platform == "cpu" else experiment.train.precision
        decode = _decode_config(opened.config, tokenizer, dtype or usual)
        model = cls.__new__(cls)
        model.config, model.tokenizer, model.step = opened.config, tokenizer, opened.step
        parameters = opened.parameters
        if quantize is not None:
            parameters = sources.quantize(parameters, _scheme(quantize))
        weights = decoding.read(decode, on, parameters)
        model.decoder = Decoder(decode, on, weights, f"step {opened.step} of {workdir}")
        return model

    @overload
    def fill(self, texts: str, strategy: str = ..., *, max_tokens: int = ..., seed: int = ...,
             stop: Sequence[str] = ..., one_context: bool = ..., out_seq_length: int | None = ...,
             say: Callable[[str], None] | None = ..., **options: object) -> Filled: ...  # fmt: skip
    @overload
    def fill(self, texts: Many, strategy: str = ..., *, max_tokens: int = ..., seed: int = ...,
             stop: Sequence[str] = ..., one_context: bool = ..., out_seq_length: int | None = ...,
             say: Callable[[str], None] | None = ..., **options: object) -> list[Filled]: ...  # fmt: skip
    def fill(
        self,
        texts: str | Many,
        strategy: str = "greedy",
        *,
        max_tokens: int = 64,
        seed: int = 1234,
        stop: Sequence[str] = (),
        one_context: bool = False,
        out_seq_length: int | None = None,
        say: Callable[[str], None] | None = None,
        **options: object,
    ) -> Filled | list[Filled]:
        """Fill the blanks of one text, or of many; the result of each is the same whatever the others are.

        Args:
            texts: text with [MASK], [sMASK] or [gMASK]; without any, it is continued.
            strategy: "greedy", "sample" or "beam".
            max_tokens, seed, stop, one_context, out_seq_length: see `glm_jax.inference.pending.Settings`.
            say: called with a line about every text whose first fill may have fewer than `max_tokens` tokens.
            options: of the strategy, see `glm_jax.inference.strategies`.

        Raises:
            UserError: a text is empty or too long, or an option is unknown or out of range.
        """
        chosen = strategies.named(strategy, **options)
        settings = Settings(chosen, max_tokens, seed, tuple(stop), one_context, out_seq_length)
        many = [texts] if isinstance(texts, str) else list(texts)
        found = dict(self.fill_each(many, settings, say))
        return found[0] if isinstance(texts, str) else [found[number] for number in range(len(many))]

    def fill_each(
        self,
        texts: Sequence[str],
        settings: Settings,
        say: Callable[[str], None] | None = None,
        watch: fill.Watch | None = None,
        *,
        repeats: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Filled]]:
        """Yield the results as they come, with the numbers of their texts; see `glm_jax.inference.fill.fill`."""
        tokenizer = self._known_tokenizer()
        return fill.fill(self.decoder, tokenizer, texts, settings, say, watch, repeats=repeats, names=names)

    @overload
    def score(self, contexts: str, targets: str) -> Scored: ...
    @overload
    def score(self, contexts: Many, targets: Many) -> list[Scored]: ...
    def score(self, contexts: str | Many, targets: str | Many) -> Scored | list[Scored]:
        """Return the log-probability, in nats, of each target as the fill of its context's first blank.

        Args:
            contexts: text with a blank; without one, the target continues it.
            targets: what fills it, without an end token.

        Raises:
            UserError: a context or a target is empty, or both together are too long for the model.
        """
        if isinstance(contexts, str) or isinstance(targets, str):
            return self.score([str(contexts)], [str(targets)])[0]
        if len(contexts) != len(targets):
            raise UserError(f"there are {len(contexts)} contexts and {len(targets)} targets: give one for each")
        pairs = [self._pair(*both, number) for number, both in enumerate(zip(contexts, targets, strict=True), 1)]
        return scoring.score(self.decoder, pairs)

    def _pair(self, text: str, target: str, number: int) -> tuple[prompts.Context, list[int]]:
        """Return the context and the target's tokens of pair `number`."""
        tokenizer = self._known_tokenizer()
        pieces = prompts.parse(tokenizer, text)
        place = prompts.next_blank(pieces)
        assert place is not None
        context, tokens = prompts.context(tokenizer, pieces, place), tokenizer.encode(target).tolist()
        if not tokens:
            raise UserError(f"target {number} is empty: give the text that fills the blank")
        if (length := len(context.tokens) + len(tokens) - 1) > self.config.max_length:
            raise UserError(f"context and target {number} have {length} tokens, the model's rows hold "
                            f"{self.config.max_length}: shorten them")  # fmt: skip
        return context, tokens

    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: convert its weights again, with --tokenizer FILE")
        return self.tokenizer


def _scheme(name: str) -> Scheme:
    if name not in WIDTHS:
        raise UserError(f"quantize is {name!r}: it must be one of {', '.join(WIDTHS)}")
    return scheme(WIDTHS[name])


def _mesh(mesh: Mesh | None) -> jax.sharding.Mesh:
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh
    sizes = dict(mesh or {})
    if unknown := sorted(sizes.keys() - set(meshes.AXES)):
        raise UserError(f"{unknown[0]!r} is no axis of a mesh: the axes are {', '.join(meshes.AXES)}")
    return meshes.build({axis: sizes.get(axis, 1) for axis in meshes.AXES})


def _decode_config(config: GLMConfig, tokenizer: Tokenizer | None, dtype: str) -> DecodeConfig:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    pieces = tokenizer.size if tokenizer else config.vocab_size
    return DecodeConfig(config, min(pieces, config.vocab_size), dtype)
