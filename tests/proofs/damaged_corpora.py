"""Build corpora in five formats, with one damaged record in a hundred, using `glm-jax corpus build`.

    python tests/proofs/damaged_corpora.py [KILLS]

The damage includes a line of 100 MB and a truncated .zst. The build is killed KILLS times (3 by default) at random
moments and resumed each time. Its result must be byte-identical to that of an undisturbed build. Every good record must
arrive, and every damaged one must be counted with its file and line. `--strict` must stop with exit code 2. Prints the
counts, times and the largest memory of a process. Takes about two minutes on two cores.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from glm_jax.data.corpora import corpus

RECORDS = 3000  # in each file
DAMAGE = {
    "invalid UTF-8": b'{"text": "caf\xe9"}',
    "broken JSON": b'{"text": "no end',
    "NUL": b'{"text": "a\0b"}',
    "missing field": b'{"body": "text"}',
}
EXPERIMENT = """
from glm_jax.config import default_config, source

def get_config():
    config = default_config()
    config.data.near_duplicates = 0.0
    config.data.tokenizer.vocab_size = 1000
    for form in ("text", "jsonl", "jsonl.zst", "json", "parquet"):
        config.data.sources[form.replace(".", "_")] = source(path=f"{texts}/*.{{form}}", format=form)
    return config
"""


def write(folder: Path) -> tuple[dict[str, set[str]], Counter[tuple[str, str, int]]]:
    """Write two files and an empty one for each format; return the good texts by format, and the damaged records."""
    draw = random.Random(0)
    good: dict[str, set[str]] = {}
    bad: Counter[tuple[str, str, int]] = Counter()
    for form in ("text", "jsonl", "jsonl.zst", "json", "parquet"):
        good[form] = set()
        for name in (f"a.{form}", f"b.{form}"):
            records: list[bytes] = []
            reasons = list(DAMAGE.items())
            for number in range(1, RECORDS + 1):
                if number % 100:
                    text = f"{name} {number} " + " ".join(f"w{draw.randrange(300)}" for _ in range(40))
                    good[form].add(text)
                    records.append(json.dumps({"text": text}).encode())
                    continue
                reason, record = reasons[number // 100 % len(reasons)]
                if number == 1500 and name.startswith("b"):
                    reason, record = "too long", b'{"text": "' + b"x" * 100_000_000 + b'"}'
                records.append(record)
                bad[reason, name, number] += 1
            _write_file(folder / name, form, records, name, bad)
        (folder / f"c.{form}").touch()
        bad["empty file", f"c.{form}", 1] += 1
    return good, bad


def _write_file(path: Path, form: str, records: list[bytes], name: str, bad: Counter[tuple[str, str, int]]) -> None:
    """Write records in a format. Where a format cannot hold a kind of damage, correct the expected counts in `bad`."""
    reasons = {line: reason for reason, file, line in bad if file == name}
    if form == "jsonl":
        path.write_bytes(b"\n".join(records) + b"\n")
    elif form == "jsonl.zst":
        path.write_bytes(zstandard.compress(b"\n".join(records) + b"\n") + zstandard.compress(b'{"text": "lost"}')[:-3])
        bad["truncated", name, len(records) + 1] += 1
    elif form == "json":
        path.write_bytes(b"[" + b",\n".join(records) + b"]")
    elif form == "text":
        lines = []
        for number, record in enumerate(records, 1):
            reason = reasons.get(number)
            if reason:
                bad[reason, name, number] -= 1
            if reason in ("broken JSON", "missing field"):
                continue
            if reason:
                bad[reason, name, len(lines) + 1] += 1
            lines += [record if reason else json.loads(record)["text"].encode(), b""]
        path.write_bytes(b"\n".join(lines))
    else:
        rows: list[bytes | None] = []
        for number, record in enumerate(records, 1):
            reason = reasons.get(number)
            if reason in ("broken JSON", "too long"):
                bad[reason, name, number] -= 1
                rows.append(None)
                bad["null", name, number] += 1
            elif reason == "missing field":
                rows.append(None)
                bad[reason, name, number] -= 1
                bad["null", name, number] += 1
            else:
                rows.append(record[10:-2] if reason else json.loads(record)["text"].encode())
        column = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)


def build(experiment: Path, cache: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "glm_jax", "corpus", "build", "--config", str(experiment), "--workers=2"]
    return subprocess.Popen(
        [*command, f"--config.data.cache={cache}", *flags], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def content(cache: Path) -> dict[str, bytes]:
    stages = ("documents", "tokenizers", "shards")
    paths = [path for stage in stages for path in (cache / stage).rglob("*") if path.is_file()]
    return {str(path.relative_to(cache)): path.read_bytes() for path in paths}


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        good, bad = write(folder / "texts")
        (folder / "experiment.py").write_text(EXPERIMENT.format(texts=folder / "texts"))
        print(f"{sum(map(len, good.values())):,} good and {bad.total():,} damaged records in five formats")
        started = time.monotonic()
        process = build(folder / "experiment.py", folder / "alone")
        assert process.communicate() and process.returncode == 0
        whole = time.monotonic() - started
        found: Counter[tuple[str, str, int]] = Counter()
        for directory in (folder / "alone" / "documents").iterdir():
            texts = {text for split in corpus.SPLITS for text in corpus.read_documents(directory, split)}
            assert texts in list(good.values())
            for line in map(json.loads, (directory / "skipped.jsonl").read_text().splitlines()):
                found[line["reason"], Path(line["file"]).name, line["line"]] += 1
        assert found == bad, (found - bad, bad - found)  # equal whether a count is 0 or missing
        print("damaged by reason:", dict(Counter(reason for reason, *_ in found)))
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        print(f"built alone in {whole:.0f} s, at most {memory:.0f} MB a process")
        draw = random.Random()
        for _ in range(kills):
            process = build(folder / "experiment.py", folder / "killed")
            try:
                process.wait(draw.uniform(1, whole / 2))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            print(f"killed: exit code {process.returncode}, {len(content(folder / 'killed'))} files")
        process = build(folder / "experiment.py", folder / "killed")
        assert process.communicate() and process.returncode == 0
        assert content(folder / "killed") == content(folder / "alone")
        print(f"resumed, and byte-identical: {len(content(folder / 'alone'))} files")
        process = build(folder / "experiment.py", folder / "strict", "--strict")
        _, said = process.communicate()
        assert process.returncode == 2, said
        print(said.splitlines()[-1])


if __name__ == "__main__":
    main()
