"""A model whose logits are set by hand: the same at every place, whatever the context."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.inference import Model
from glm_jax.model import GLMConfig, init

BYTES = 256
SHIFT = 5.0


class Bytes:
    """A tokenizer whose pieces are the 256 bytes; behind them come the special tokens."""

    model, digest = b"", "bytes"
    size = BYTES + 7
    smask, mask, gmask, sop, eop, eos, pad = range(BYTES, BYTES + 7)
    unk = pad
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    strips_before_blanks = False
    token_bytes = np.array([1] * BYTES + [0] * 7, np.int32)

    def encode(self, text: str, /) -> np.ndarray:
        """Return the bytes of a text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int], /, *, specials: bool = False) -> str:
        """Return the text of bytes."""
        return bytes(token for token in ids if token < BYTES).decode(errors="replace")


def model(probabilities: Mapping[str, float] | None = None, length: int = 64, ends: float = 0.0) -> Model:
    """Return a model that gives each character its probability, the other bytes equal parts of the rest.

    Of the special tokens eop has the probability `ends`, and the others have none. Without probabilities, all bytes are
    equally likely. The logits are SHIFT above the log-probabilities: a sum of logits that nothing normalises prefers
    long texts, whatever they say.
    """
    chosen = {ord(character): value for character, value in (probabilities or {}).items()}
    others = np.log((1 - ends - sum(chosen.values())) / (BYTES - len(chosen)))
    logits = np.full(Bytes.size, -1e4, np.float32)
    logits[:BYTES] = others
    for token, value in chosen.items():
        logits[token] = np.log(value)
    if ends:
        logits[Bytes.eop] = np.log(ends)
    logits += SHIFT
    cfg = GLMConfig(
        num_layers=1, hidden_size=8, num_heads=1, ffn_size=8, vocab_size=Bytes.size, max_length=length, norm="pre"
    )
    params = init(cfg, jax.random.key(0))
    # the last norm gives 1 in its first place and 0 in the others, so that the head's first column is the logits
    params["final_norm"] = {"scale": jnp.zeros(8), "bias": jnp.zeros(8).at[0].set(1.0)}
    params["embedding"]["word"] = jnp.zeros((Bytes.size, 8)).at[:, 0].set(logits)
    return Model(cfg, params, Bytes())
