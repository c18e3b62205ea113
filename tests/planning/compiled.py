"""Compiles small programs for 8 emulated devices and prints their reports, one a line; run in a subprocess."""

from __future__ import annotations

import json

from glm_jax.config import default_config, resolve, with_changes
from glm_jax.planning import compile
from glm_jax.planning.compile import Request
from glm_jax.planning.programs import Inference

EXPERIMENT = resolve(
    default_config(),
    {
        "model.num_layers": 3, "model.hidden_size": 64, "model.num_heads": 4, "model.ffn_size": 128,
        "model.vocab_size": 16384, "data.seq_length": 32, "mesh.data": 2, "mesh.pipeline": 2, "mesh.tensor": 2,
        "train.global_batch": 16, "train.microbatches": 4,
    },
)  # fmt: skip


def main() -> None:
    """Print the reports of a step, of the same with LoRA, and of decoding with 16, 8 and 4 bits."""
    lora = with_changes(EXPERIMENT, {"train.lora.rank": 2, "train.init_from": "weights"})
    requests = [Request(EXPERIMENT), Request(lora)]
    for weights in ("float16", "int8", "int4"):
        inference = Inference(weights, room=32, group=0)
        requests.append(Request(EXPERIMENT, program="decode", inference=inference))
    compile.SHOWN = 10_000  # all arrays
    for request in requests:
        print(json.dumps(compile.compile_here(request).to_json()), flush=True)


if __name__ == "__main__":
    main()
