"""The blocks of docs/library.md, run from first to last on eight emulated devices."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import ENGLISH
from tests.patience import HANG

GUIDE = Path(__file__).parents[2] / "docs" / "library.md"
# Prints the values of the guide's names at its end, for this process to check.
REPORT = """
import json
import numpy as np
alone = glm_jax.load(config, **{"mesh.data": 1}).gradients(rows_again)
apart = [float(np.abs(a - np.asarray(b)).max()) for a, b in
         zip(jax.tree.leaves(alone.gradients), jax.tree.leaves(found.gradients))]
print("REPORT", json.dumps({
    "apart": max(apart),
    "largest": max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(found.gradients)),
    "split": [str(shard.data.shape) for shard in word.addressable_shards][:1], "shape": word.shape,
    "run": run.step, "first": first, "losses": losses, "event": event, "version": glm_jax.__version__,
    "logits": logits.shape, "rows": rows.tokens.shape,
}))
"""


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(ENGLISH, k=60)).capitalize() + "." for _ in range(150)]
    (tmp_path / "novel.txt").write_text("\n\n".join(texts), encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.M | re.S)
    script = "\n".join(blocks).replace("spread.close()", "rows_again = spread.rows()\nspread.close()") + REPORT
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.partition("REPORT ")[2])
    assert report["apart"] < 1e-5 * report["largest"] and report["split"] != [str(tuple(report["shape"]))]
    assert report["logits"][:2] == report["rows"] == [8, 64]
    assert (report["run"], report["first"], len(report["losses"])) == (2, 3, 3)
    assert np.isfinite(report["losses"]).all()
    assert report["event"]["loss/doubled"] == pytest.approx(2 * report["event"]["loss"])
    assert report["version"].count(".") >= 1 and (tmp_path / "runs" / "first" / "checkpoints" / "2").is_dir()
