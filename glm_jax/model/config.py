"""The shape and the choices of a GLM, and the arithmetic that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Norm = Literal["deepnorm", "post", "pre", "sandwich"]
Position = Literal["rope", "alibi", "learned_2d"]
Activation = Literal["geglu", "gelu", "gelu_tanh"]
Initialisation = Literal["xavier", "normal", "largescale"]


@dataclasses.dataclass(frozen=True)
class GLMConfig:
    """A GLM. Frozen and hashable, so that it can be a static argument of jit; defaults are GLM-130B's choices.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int  # F: the inner width; a GLU has two projections of this width
    vocab_size: int  # V: rows of the embedding, padding included
    max_length: int = 2048  # rows of a position table (learned_2d only)
    norm: Norm = "deepnorm"
    position: Position = "rope"
    activation: Activation = "geglu"
    attention_dropout: float = 0.1  # both act only where a key is given
    hidden_dropout: float = 0.1
    embedding_norm: bool = False  # BLOOM's layer norm on the embedding
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    rope_angles: Literal["float32", "float16"] = "float32"  # float16: the released inference code's tables
    score_scaling: bool = True  # query-key layer scaling: cancels out, keeps float16 scores in range
    pb_relax: float = 0.0  # CogView's alpha (GLM's trials took 128) in place of score_scaling; 0: off
    initialisation: Initialisation = "xavier"

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "ffn_size", "vocab_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head dimension, not {self.head_dim}")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], pieces: int, seq_length: int) -> GLMConfig:
        """Read the section `model` of an experiment's config.

        Args:
            section: its keys are fields of this class, and `vocab_multiple`. A vocab_size or max_length of 0 follows
                from the other arguments.
            pieces: of the tokenizer; padded to `vocab_multiple`, whatever the mesh.
            seq_length: of the training rows.
        """
        values = dict(section)
        multiple = values.pop("vocab_multiple")
        values["vocab_size"] = values["vocab_size"] or -(-pieces // multiple) * multiple
        values["max_length"] = values["max_length"] or seq_length
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def up_projections(self) -> int:
        """How many projections of width F enter the feed-forward: a GLU has two halves."""
        return 2 if self.activation == "geglu" else 1

    @property
    def num_parameters(self) -> int:
        """Every parameter, the tied embedding once. GLM-130B: 128,697,794,560."""
        hidden, inner, norm = self.hidden_size, self.ffn_size, 2 * self.hidden_size
        attention = 4 * hidden * hidden + 4 * hidden
        feedforward = (self.up_projections + 1) * hidden * inner + self.up_projections * inner + hidden
        norms = 4 if self.norm == "sandwich" else 2
        embedding = self.vocab_size * hidden + (norm if self.embedding_norm else 0)
        if self.position == "learned_2d":
            embedding += 2 * self.max_length * hidden
        return self.num_layers * (attention + feedforward + norms * norm) + embedding + norm

    def forward_flops(self, sequence: int) -> int:
        """Floating-point operations of the matmuls of one forward pass over one row of `sequence` tokens.

        Counts 2 for a multiply-add and the whole score matrix, masked or not, as it is what runs. A training step
        is three of these, four where the forward is recomputed.
        """
        hidden, inner = self.hidden_size, self.ffn_size
        layer = 2 * (4 * hidden * hidden + (self.up_projections + 1) * hidden * inner)  # projections, a token
        scores = 2 * 2 * sequence * hidden  # scores and weighted values, a token
        return sequence * (self.num_layers * (layer + scores) + 2 * hidden * self.vocab_size)
