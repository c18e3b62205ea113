"""Build a small corpus: `build_until.py FOLDER WORKERS COMMITS [UNTIL]`.

The process kills itself just before its COMMITS-th rename; 0 disables this. Once the cache holds a path that matches
the glob UNTIL, neither this process nor a worker renames anything, so that whoever waits for the path can kill it.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

from glm_jax.config import default_config, resolve, source
from glm_jax.data.corpora import corpus
from glm_jax.data.corpora.prepare import prepare

folder, workers, commits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
until = sys.argv[4] if len(sys.argv) > 4 else ""
rename, count = os.replace, itertools.count(1)


def replace(*names) -> None:
    if next(count) == commits:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(10_000):  # not forever, in case nobody kills it
        if not until or not list((folder / "cache").glob(until)):
            break
        time.sleep(0.05)
    rename(*names)


os.replace = replace  # at module level, because workers run this module, too


def main() -> None:
    corpus.PART_BYTES = 4000
    config = default_config()
    config.data.cache = str(folder / "cache")
    config.data.tokenizer.vocab_size = 400
    config.data.sources.en = source(path=str(folder / "*.jsonl"), format="jsonl")
    config.data.sources.zh = source(path=str(folder / "*.txt"))
    prepare(resolve(config), print, workers=workers, strict=False)


if __name__ == "__main__":
    main()
