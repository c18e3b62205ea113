"""GLM as a model of lm-eval, for `lm_eval.simple_evaluate`, and for its command line.

    python -m glm_jax.evaluation.lm_eval_model run --model glm-jax --model_args workdir=DIR --tasks hellaswag

is the command `lm_eval`, which knows `glm-jax` by itself from the version after 0.4.13 on, by our entry point. Import
this module only where lm-eval is used: that takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from glm_jax.evaluation.lm_eval_requests import SEED, TYPES, Reader, Response
from glm_jax.inference import Model
from glm_jax.inference.model import Dtype


class GlmJax(LM):
    """A model of a workdir, or one that is open."""

    def __init__(
        self,
        workdir: str | Path | Model,
        *,
        data: int = 1,
        pipeline: int = 1,
        tensor: int = 1,
        dtype: Dtype | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        step: int | None = None,
        unidirectional: bool = False,
        seed: int = SEED,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        """Open the model.

        Args:
            workdir: as for `Model.open`; or a model, and then `dtype`, `quantize`, `step` and the mesh are its own.
            data, pipeline, tensor: sizes of the mesh.
            dtype, quantize, step: as for `Model.open`.
            unidirectional: read contexts from left to right instead of in both directions.
            seed: of sampled answers.
            batch_size, max_batch_size, device: not used, as batches have the size that fits; lm-eval gives them.

        Raises:
            UserError: see `Model.open` and `Reader.of`.
        """
        super().__init__()
        if not isinstance(workdir, Model):
            mesh = {"data": data, "pipeline": pipeline, "tensor": tensor}
            workdir = Model.open(workdir, mesh, dtype, quantize, step)
        self._reader = Reader.of(workdir, causal=unidirectional, seed=seed)

    @property
    def tokenizer_name(self) -> str:
        """The identity of the tokenizer, for lm-eval's cache."""
        return self._reader.tokenizer.digest

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation in nats, and whether greedy decoding would give it."""
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return the log-probability of each text in nats."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return what follows each context."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        asked = TYPES[kind](self._reader, [request.args for request in requests])
        lines = list(asked.notes)
        if cut := sum(asked.cut):
            lines.append(f"{cut} of {len(requests)} contexts keep only their end, which is what the model's rows hold")
        for line in lines:
            logging.getLogger(__name__).warning(line)
        found = dict[int, Response]()
        for batch in asked.run(range(len(requests))):
            for number, response in batch:
                found[number] = response
                self.cache_hook.add_partial(kind, requests[number].args, response)
        return [found[number] for number in range(len(requests))]


register_model("glm-jax")(GlmJax)  # not as a decorator, whose type hides the class


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
