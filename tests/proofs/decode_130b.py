"""Compile GLM-130B's prefill and the generation of its tokens, from shapes alone, and report the memory of a device.

    python tests/proofs/decode_130b.py [--target cpu|a100|rtx3090|v5e:4x4] [--tensor 8] [--pipeline 1] [--bound 31]
        [--weights float16|bfloat16|int8|int4] [--group 0] [--rows 1] [--room 2048] [--program decode|prefill]

70 layers of 12,288 and 150,528 rows of vocabulary, as in experiments/glm_130b.py, on `tensor` x `pipeline` devices.
Each stage has a group of `rows` rows, each row has `room` places in the cache, and prefill takes contexts that fill
them. Quantised weights are absmax by row with a scale for the inputs of each device, as they were released, or by
groups of `--group` inputs. Nothing runs: the devices exist in name only. GPU targets need XLA's CUDA compiler
(jax-cuda12-plugin, jax-cuda12-pjrt and the nvidia wheels they require), TPU targets need libtpu. The bound is in GB
(1e9 bytes) a device; by default it is all of the device's memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "64", "TPU_SKIP_MDS_QUERY": "1"}

from tests.engine import decode_shapes  # noqa: E402 (needs the path, and reads the environment)
from tests.parallel import hlo  # noqa: E402
from tests.proofs import targets  # noqa: E402

NUM_TOKENS = 150_344  # pieces of the official tokenizer
QUANTIZED = {"int8": 8, "int4": 4}
TPU_MEMORY = 16.9e9  # 15.75 GiB of a v5e's 16, which libtpu leaves to programs and their arrays


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="cpu", help="cpu, a100, rtx3090, or a TPU topology such as v5e:4x4")
    parser.add_argument("--program", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--weights", choices=("float16", "bfloat16", "float32", "int8", "int4"), default="float16")
    parser.add_argument("--group", type=int, default=0, help="inputs that share a scale; 0: by row, as released")
    for flag, default in (("tensor", 8), ("pipeline", 1), ("rows", 1), ("room", 2048)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="fewer than 70, for a quick look")
    parser.add_argument("--bound", type=float, help="fail above this many GB (1e9 bytes) a device")
    parser.add_argument("--hlo", type=Path, help="write the compiled program here")
    return parser.parse_args()


def lower(options: argparse.Namespace) -> Any:
    """Lower the program."""
    from glm_jax.config import resolve
    from glm_jax.engine import decode
    from glm_jax.engine.weights import DecodeConfig
    from glm_jax.inference.sampling import Sampler
    from glm_jax.model.quantized import Scheme
    from glm_jax.parallel import mesh as meshes

    config = targets.glm_130b()
    config.model.num_layers = options.layers or config.model.num_layers
    bits = QUANTIZED.get(options.weights)
    compute = options.weights if bits is None else "bfloat16" if options.target.startswith("v") else "float16"
    cfg = DecodeConfig(resolve(config).glm(NUM_TOKENS), NUM_TOKENS, compute)
    sizes = {"data": 1, "pipeline": options.pipeline, "tensor": options.tensor}
    mesh = meshes.build(sizes, targets.devices(options.target, options.pipeline * options.tensor))
    params = decode_shapes.param_shapes(cfg.model, Scheme(bits, options.group, ranks=options.tensor) if bits else None)
    batch = decode_shapes.Batch(options.pipeline, options.rows, options.room)
    if options.program == "prefill":
        return decode.prefill.lower(cfg, mesh, *decode_shapes.prefill_arguments(cfg, mesh, params, batch))
    return decode.decode.lower(cfg, mesh, Sampler(), *decode_shapes.decode_arguments(cfg, mesh, params, batch))


def capacity(target: str) -> float:
    """Return the bytes of a device, or infinity for the CPU."""
    if target == "cpu":
        return float("inf")
    return targets.CARDS[target].memory if target in targets.CARDS else TPU_MEMORY


def report(options: argparse.Namespace, compiled: Any, lowering: float, compiling: float) -> float:
    """Print the results; return the peak in GB."""
    memory = compiled.memory_analysis()
    peak = targets.peak_bytes(options.target, memory)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux gives kB
    text = compiled.as_text() or ""
    if options.hlo:
        options.hlo.write_text(text, encoding="utf-8")
    found = hlo.collectives(text, (1, options.pipeline, options.tensor))
    grouped = f", groups of {options.group}" if options.group and options.weights in QUANTIZED else ""
    print(f"{options.target}: {options.program}, {options.weights}{grouped}, tensor={options.tensor} "
          f"pipeline={options.pipeline}, {options.pipeline} x {options.rows} rows of {options.room}; "
          "compiled from shapes, not run")  # fmt: skip
    print(f"peak {peak / 1e9:.2f} GB a device: arguments {memory.argument_size_in_bytes / 1e9:.2f}, "
          f"temporaries {memory.temp_size_in_bytes / 1e9:.2f}")  # fmt: skip
    if options.target in targets.CARDS:
        card = targets.CARDS[options.target].memory
        print(f"the card has {card / 1e9:.2f} GB, XLA's pool {targets.POOL * card / 1e9:.2f} GB by default")
    print(f"collectives by axes, in the loop {found['inside']}, outside {found['outside']}")
    print(f"lowered in {lowering:.1f} s, compiled in {compiling:.1f} s, {resident:.2f} GB resident", flush=True)
    return peak / 1e9


def main() -> int:
    """Lower, compile, report; return 1 if the program is over the bound."""
    options = arguments()
    began = time.monotonic()
    lowered = lower(options)
    lowered_at = time.monotonic()
    compiled = lowered.compile()
    peak = report(options, compiled, lowered_at - began, time.monotonic() - lowered_at)
    bound = options.bound or capacity(options.target) / 1e9
    if peak > bound:
        print(f"that is over the bound of {bound:.2f} GB")
    return int(peak > bound)


if __name__ == "__main__":
    sys.exit(main())
