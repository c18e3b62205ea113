"""A trained model, opened from a workdir."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm_jax.config.fields import local_path
from glm_jax.data.tokenizers.protocol import Tokenizer
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
        return cls(config.glm(tokenizer.size if tokenizer else 0), load_params(workdir), tokenizer)
