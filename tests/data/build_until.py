"""Build a small corpus: `build_until.py FOLDER WORKERS COMMITS`.

The process kills itself just before its rename of number COMMITS; 0: never.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from glm_jax.config import default_config, resolve, source
from glm_jax.data import corpus, readers
from glm_jax.data.prepare import prepare


def main() -> None:
    folder, workers, commits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    corpus.PART_BYTES, readers.RANGE_BYTES = 6000, 3000
    config = default_config()
    config.data.cache = str(folder / "cache")
    config.data.tokenizer.vocab_size = 400
    config.data.sources.en = source(path=str(folder / "*.jsonl"), format="jsonl")
    config.data.sources.zh = source(path=str(folder / "*.txt"))
    rename, count = os.replace, itertools.count(1)

    def replace(*names) -> None:
        if next(count) == commits:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    os.replace = replace
    prepare(resolve(config), print, workers=workers, strict=False)


if __name__ == "__main__":
    main()
