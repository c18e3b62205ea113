"""Show what weights of 8 and 4 bits cost in held-out loss.

    glm-jax train --config quickstart --workdir runs/quickstart
    python tests/proofs/quantized_heldout.py --workdir runs/quickstart

quantises the quickstart weights in every way that there is, evaluates each over the same held-out rows and blanks and
prints the loss beside that of float32. It fails if 8 bits cost more than 0.1%, or 4 bits by group more than 3%. The
quantised kernels are multiplied as floats, after the rounding that they have in inference. Takes two minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import glm_jax
from glm_jax.cli import main as cli

WAYS = {
    "INT8 by row": ["--bits=8"],
    "INT8 by groups of 128": ["--bits=8", "--group=128"],
    "INT4 by row": ["--bits=4", "--group=0"],
    "INT4 by groups of 128": ["--bits=4", "--group=128"],
    "INT4 by groups of 32": ["--bits=4", "--group=32"],
    "INT8 by row, zero point": ["--bits=8", "--rounding=zeropoint"],
    "INT4 by row, zero point": ["--bits=4", "--group=0", "--rounding=zeropoint"],
    "INT4 by groups of 32, zero point": ["--bits=4", "--group=32", "--rounding=zeropoint"],
}


def losses(weights: Path) -> dict[str, float]:
    """Return the held-out losses of weights under the quickstart's config, in nats a token."""
    changes: dict[str, Any] = {"train.init_from": str(weights)}
    run = glm_jax.load("quickstart", say=lambda line: None, **changes)
    with run:
        return run.evaluate()


def main() -> int:
    """Print a line for each way; return 1 if one costs more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of the quickstart")
    workdir = parser.parse_args().workdir
    whole = losses(workdir)
    print(f"{'float32':34}{whole['loss']:.5f}   en {whole['loss/en']:.5f}   zh {whole['loss/zh']:.5f}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(WAYS.items()):
            out = Path(folder) / str(number)
            assert cli.main(["convert", "quantize", f"--path={workdir}", f"--out={out}", *flags]) == 0
            found = losses(out)
            change = found["loss"] / whole["loss"] - 1
            failed |= change > (0.001 if "INT8" in name else 0.03 if "group" in name else float("inf"))
            print(f"{name:34}{found['loss']:.5f} {100 * change:+.3f}%   en {found['loss/en']:.5f}   "
                  f"zh {found['loss/zh']:.5f}", flush=True)  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
