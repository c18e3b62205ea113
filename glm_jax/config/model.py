"""The section `model`, and the architecture that follows from it once the vocabulary is known."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from glm_jax.config.fields import Section, definitions, field
from glm_jax.errors import UserError

Norm = Literal["deepnorm", "post", "pre", "sandwich"]
Position = Literal["rope", "alibi", "learned_2d"]
Activation = Literal["geglu", "gelu", "gelu_tanh"]
Initialisation = Literal["xavier", "normal", "largescale"]


@dataclass(frozen=True)
class Architecture(Section):
    """What the section and GLMConfig have in common. Defaults are GLM-130B's choices at a size for a laptop."""

    num_layers: int = field(4, at_least=1, doc="L, transformer blocks")
    hidden_size: int = field(128, at_least=1, doc="D, the width of the residual stream")
    num_heads: int = field(4, at_least=1, doc="N, attention heads; divides hidden_size")
    ffn_size: int = field(344, at_least=1, doc="F, the inner width; GeGLU's is 8/3 of the hidden size, as in GLM-130B")
    _: KW_ONLY
    norm: Norm = field("deepnorm", doc="where the layer norms are, and how the residual is scaled")
    position: Position = field("rope", doc="how positions enter the model")
    activation: Activation = field("geglu", doc="activation of the feed-forward")
    attention_dropout: float = field(0.0, at_least=0, below=1, doc="dropout of attention probabilities")
    hidden_dropout: float = field(0.0, at_least=0, below=1, doc="dropout of the embedding and of each sublayer")
    embedding_norm: bool = field(False, doc="BLOOM's layer norm on the embedding")
    norm_epsilon: float = field(1e-5, above=0, doc="added to the variance in every layer norm")
    rope_base: float = field(10000.0, above=0, doc="base of the rotary frequencies")
    rope_angles: Literal["float32", "float16"] = field("float32", doc="float16: the released inference code's tables")
    score_scaling: bool = field(True, doc="query-key layer scaling: cancels out, keeps float16 scores in range")
    softmax_dtype: Literal["float32", "float16"] = field(
        "float32",
        doc="of the scores from their product to their probabilities; float16: what GLM-130B's authors gave up",
    )
    pb_relax: float = field(
        0.0,
        at_least=0,
        doc="CogView's alpha (GLM's trials used 128), instead of score_scaling; 0 disables",
    )
    qk_norm: bool = field(
        False, doc="layer norm on each head's queries and keys before their rotation (ViT-22B); not GLM-130B's"
    )
    initialisation: Initialisation = field("xavier", doc="distribution of the initial kernels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"hidden_size / num_heads is {self.head_dim}: rotary positions need it to be even")

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Model(Architecture):
    """The section `model`: an architecture whose vocabulary and lengths may follow from the data."""

    vocab_size: int = field(
        0, at_least=0, doc="rows of the embedding; 0: the tokenizer's pieces, padded to a multiple of vocab_multiple"
    )
    max_length: int = field(0, at_least=0, doc="rows of a position table; 0: data.seq_length")
    vocab_multiple: int = field(128, at_least=1, doc="the padded vocabulary is a multiple of this, whatever the mesh")

    def glm(self, pieces: int, seq_length: int) -> GLMConfig:
        """Return the architecture for a tokenizer of `pieces` pieces and rows of `seq_length` tokens.

        Raises:
            UserError: vocab_size is less than `pieces`.
        """
        if 0 < self.vocab_size < pieces:
            raise UserError(
                f"model.vocab_size {self.vocab_size} is less than the tokenizer's {pieces} pieces: "
                "raise it, or set it to 0"
            )
        padded = -(-pieces // self.vocab_multiple) * self.vocab_multiple
        shared = {one.name: getattr(self, one.name) for one in definitions(Architecture)}
        return GLMConfig(**shared, vocab_size=self.vocab_size or padded, max_length=self.max_length or seq_length)


@dataclass(frozen=True)
class GLMConfig(Architecture):
    """A GLM, as the static argument of the model's functions. Frozen and hashable.

    Raises:
        ValueError: a value is not one of its choices or is out of range, or sizes do not fit one another.
    """

    vocab_size: int = field(0, at_least=1, doc="V, rows of the embedding, padding included")
    max_length: int = field(2048, at_least=1, doc="rows of a position table (learned_2d only)")

    @property
    def up_projections(self) -> int:
        """The number of up projections of width F in the feed-forward: 2 for a GLU, else 1."""
        return 2 if self.activation == "geglu" else 1

    @property
    def num_parameters(self) -> int:
        """The number of parameters, with the tied embedding counted once. GLM-130B: 128,697,794,560."""
        hidden, inner, norm = self.hidden_size, self.ffn_size, 2 * self.hidden_size
        attention = 4 * hidden * hidden + 4 * hidden + (2 * self.head_dim if self.qk_norm else 0)
        feedforward = (self.up_projections + 1) * hidden * inner + self.up_projections * inner + hidden
        norms = 4 if self.norm == "sandwich" else 2
        embedding = self.vocab_size * hidden + (norm if self.embedding_norm else 0)
        if self.position == "learned_2d":
            embedding += 2 * self.max_length * hidden
        return self.num_layers * (attention + feedforward + norms * norm) + embedding + norm

    def forward_flops(self, sequence: int) -> int:
        """Return the floating-point operations of the matmuls in a forward pass over a row of `sequence` tokens.

        A multiply-add counts as 2. The whole score matrix counts, masked or not, because all of it is computed. A
        training step takes three times as many, or four times where the forward pass is recomputed.
        """
        hidden, inner = self.hidden_size, self.ffn_size
        layer = 2 * (4 * hidden * hidden + (self.up_projections + 1) * hidden * inner)  # projections, a token
        scores = 2 * 2 * sequence * hidden  # scores and weighted values, a token
        return sequence * (self.num_layers * (layer + scores) + 2 * hidden * self.vocab_size)

    def published_flops(self, sequence: int, passes: int) -> float:
        """Return a row's floating-point operations by the formula of GLM-130B's training code, which its log quotes.

        24 c s N h^2 (1 + s / 6h + V / 16 N h), with a row of s tokens, N layers, hidden size h and V rows of the
        embedding; c is `passes`: 3 for forward and backward, 4 with the forward pass recomputed. It assumes a
        feed-forward of 8 h^2 weights a layer, which GLM-130B's GeGLU has. The head, which is never recomputed, is
        counted correctly for 4 passes; for 3 it counts as 3/4 of that, because the paper's MFU is 3/4 of its HFU.
        """
        hidden, layers = self.hidden_size, self.num_layers
        attention, head = sequence / (6 * hidden), self.vocab_size / (16 * layers * hidden)
        return 24 * passes * sequence * layers * hidden**2 * (1 + attention + head)
