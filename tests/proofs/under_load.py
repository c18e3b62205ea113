"""Run the tests that depend on time many times on a busy machine, and count how each ends.

    python -m tests.proofs.under_load --rounds 20 --load 8 --out FILE.jsonl

Keeps `--load` processes busy: `--jobs` rounds in parallel, each of which runs one test at a time, and busy loops for
the rest. FILE.jsonl holds a line for each round that has ended; the same command resumes where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
# Tests that send signals, kill processes, wait for them, or read a clock.
TESTS = (
    "tests/data/test_build.py",
    "tests/data/test_samples.py",
    "tests/end_to_end/test_config_command.py",
    "tests/end_to_end/test_kills.py",
    "tests/end_to_end/test_log_replay.py",
    "tests/end_to_end/test_resumes.py",
    "tests/end_to_end/test_several_processes.py",
    "tests/end_to_end/test_sweep_command.py",
    "tests/end_to_end/test_train.py",
    "tests/parallel/test_mesh.py",
    "tests/parallel/test_start.py",
    "tests/workdir/test_checkpoint.py",
    "tests/workdir/test_checkpoint_damage.py",
    "tests/workdir/test_monitor.py",
)


def busy() -> None:
    """Compute until killed."""
    while True:
        pass


def one_round(number: int, tests: Sequence[str]) -> dict[str, object]:
    """Run every test once and return how each ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        flags = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *flags, *tests], cwd=ROOT, capture_output=True)
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [found.get("message", "") for found in case if found.tag in ("failure", "error")]
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = bad[0][:300] if bad else ""
    return {"round": number, "seconds": round(time.monotonic() - started), "outcomes": outcomes}


def table(rounds: list[dict[str, dict[str, str]]]) -> str:
    """Return how often each test that failed ran and failed, and the number of tests that never failed."""
    runs, failures = collections.Counter[str](), collections.defaultdict[str, list[str]](list)
    for entry in rounds:
        for test, why in entry["outcomes"].items():
            runs[test] += 1
            if why:
                failures[test].append(why)
    lines = [f"{len(failures[test])} of {runs[test]} failed: {test}: {failures[test][0]}" for test in sorted(failures)]
    steady = [runs[test] for test in runs if test not in failures]
    return "\n".join([*lines, f"{len(steady)} tests never failed, in {min(steady, default=0)} runs each or more"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--load", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=TESTS, help="as pytest takes them; by default all of TESTS")
    options = parser.parse_args()
    text = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    done = [json.loads(line) for line in text.splitlines()]
    loops = [multiprocessing.Process(target=busy, daemon=True) for _ in range(options.load - options.jobs)]
    for loop in loops:
        loop.start()
    left = range(len(done), options.rounds)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, open(options.out, "a", encoding="utf-8") as out:
        futures = [pool.submit(one_round, number, options.tests) for number in left]
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(left), desc="rounds"):
            done.append(future.result())
            out.write(json.dumps(done[-1]) + "\n")
            out.flush()
    for loop in loops:
        loop.kill()
    print(table(done))


if __name__ == "__main__":
    main()
