"""A trained model, opened from a workdir."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm_jax.config.fields import local_path
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.interop import arrays
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig
from glm_jax.types import Tree
from glm_jax.workdir import folder
from glm_jax.workdir.checkpoints import load_params


@dataclass(frozen=True)
class Model:
    """What generation needs: a config, params on one device, and the tokenizer."""

    config: GLMConfig
    params: Tree  # as model.init returns them
    tokenizer: Tokenizer | None  # None: the weights were converted without one

    @classmethod
    def open(cls, workdir: str | Path) -> Model:
        """Open the newest good checkpoint of a workdir.

        Raises:
            UserError: the workdir is a URL, or holds no run, no checkpoint, or none with good params.
        """
        workdir = local_path(workdir, "the workdir")
        config = folder.read_config(workdir)
        tokenizer = None if folder.lacks_tokenizer(workdir) else folder.read_tokenizer(workdir)
        adapted = config.train.lora.rank > 0
        params = arrays.load(open_weights(workdir).parameters) if adapted else load_params(workdir)
        return cls(config.glm(tokenizer.size if tokenizer else 0), params, tokenizer)
