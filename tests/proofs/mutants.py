"""Mutate the code with cosmic-ray, one place at a time, and count the mutants that the tests detect.

    python -m tests.proofs.mutants --sample 300 --seed 1 --out FILE.jsonl [--jobs 2] [--rooms model parallel ...]
    python -m tests.proofs.mutants --table FILE.jsonl

Needs the extra `mutation`. The sample is the same for the same seed and code, and is printed first. Each mutant then
runs the tests of its room (and those that mutants_tests.ELSEWHERE adds) in a private copy of the tree, starting with
the tests that run the changed line. A failure that a busy machine may have caused must repeat. FILE.jsonl holds a line
for each finished mutant: the same command resumes where it stopped, and `--rerun survived` runs the survivors again
after the tests have changed. FILE.clean.jsonl holds measurements of the tests on the clean tree; only files that
changed are measured again. mutants_equivalent.txt lists the mutants that no input can tell from the code; they are
counted separately and do not run.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.proofs import mutants_draw, mutants_tests
from tests.proofs.mutants_draw import Mutant
from tests.proofs.mutants_tests import Copy, TestFile

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
STATUSES = ("killed", "timeout", "equivalent", "survived", "broken")
PATIENCE = 1800  # seconds that a clean test file may take, including compilation
LEAST, GENEROUS = 120, 5  # a mutant may take so many seconds, or so many times what its room's clean tests take
NEVER_COMPILES = ("rows",)  # here the limit follows from the test files of the mutant alone


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, and skip a line that was cut off while it was written."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry so that it survives a crash of the script."""
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the previous line was cut off
                file.write(b"\n")
        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def known_equivalents(text: str) -> dict[tuple[str, str, str], str]:
    """Read the known equivalents: path, operator, the changed line and the reason, between tabs."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    fields = [[field.strip() for field in line.split("\t")] for line in lines]
    return {(path, operator, after): reason for path, operator, after, reason in fields}


def newest(entries: Iterable[Mapping[str, Any]], equivalent: Mapping[tuple[str, str, str], str]) -> dict[str, Any]:
    """Return the newest result of each mutant by its key; mark survivors known to be equivalent as equivalent."""
    results: dict[str, Any] = {}
    for entry in entries:
        if entry["kind"] == "result":
            same = entry["status"] == "survived" and (entry["path"], entry["operator"], entry["after"]) in equivalent
            results[entry["key"]] = {**entry, "status": "equivalent"} if same else entry
    return results


def remaining(keys: Sequence[str], results: Mapping[str, Any], rerun: Iterable[str] = ()) -> list[str]:
    """Return the keys to run, in their order: those without a result, and those whose status is in `rerun`."""
    return [key for key in keys if key not in results or results[key]["status"] in (*rerun, "broken")]


def table(entries: Sequence[Mapping[str, Any]], equivalent: Mapping[tuple[str, str, str], str]) -> str:
    """Return the results of the newest sample as a markdown table by room, with a list of the survivors."""
    sample = next(entry for entry in reversed(entries) if entry["kind"] == "sample")
    results = newest(entries, equivalent)
    rooms = sample["rooms"]
    counts = {room: collections.Counter[str]() for room in rooms}
    left = []
    for key, room in zip(sample["keys"], sample["room_of"], strict=True):
        counts[room]["sampled"] += 1
        if key in results:
            counts[room][results[key]["status"]] += 1
            left += [results[key]] if results[key]["status"] in ("survived", "broken") else []
    head = ("room", "mutants in all", "sampled", "killed", "timed out", "equivalent", "survived", "percent killed")
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    for room, count, size in [*((room, counts[room], rooms[room]) for room in rooms),
                              ("all", total, sum(rooms.values()))]:  # fmt: skip
        numbers = (count[name] for name in ("sampled", "killed", "timeout", "equivalent", "survived"))
        lines.append(f"| {room} | {size} | " + " | ".join(map(str, numbers)) + f" | {percent_killed(count)} |")
    unfinished = total["sampled"] - sum(total[status] for status in STATUSES[:-1])
    if unfinished:
        lines += ["", f"{unfinished} not finished: they count as if they had not been drawn."]
    lines += ["", *(f"- {describe(entry)}: {entry['status']}" + ("" if entry["covered"] else ", no test runs the line")
                    for entry in left)]  # fmt: skip
    unsteady = {test for key in sample["keys"] for test in results.get(key, {}).get("unsteady", [])}
    if unsteady:
        lines += ["", f"Failed once and then passed on the same mutant: {', '.join(sorted(unsteady))}."]
    return "\n".join(lines)


def percent_killed(count: Mapping[str, int]) -> str:
    """Return the share killed, including by timeout, of all that ended and are not equivalent."""
    killed = count["killed"] + count["timeout"]
    judged = killed + count["survived"]
    return f"{100 * killed / judged:.1f}" if judged else "-"


def describe(entry: Mapping[str, Any]) -> str:
    name = entry["operator"].removeprefix("core/")
    return f"{entry['path']}:{entry['line']} {name}: `{entry['before']}` -> `{entry['after'] or '(removed)'}`"


def draw_sample(rooms: Sequence[str], sample: int, seed: int) -> tuple[list[Mutant], dict[str, Any]]:
    """Draw the sample; also return the entry that says what it was drawn from."""
    mutants: list[Mutant] = []
    left_out: collections.Counter[str] = collections.Counter()
    for room in rooms:
        for path in mutants_draw.modules(ROOT, room):
            found, reasons = mutants_draw.find(ROOT, room, path)
            mutants += found
            left_out += reasons
    drawn = mutants_draw.draw(mutants, sample, seed, lambda mutant: mutants_draw.mutated(ROOT, mutant) is not None)
    sizes = collections.Counter(mutant.room for mutant in mutants)
    return drawn, {
        "kind": "sample",
        "seed": seed,
        "rooms": {room: sizes[room] for room in rooms},
        "left_out": dict(left_out),
        "keys": [mutant.key for mutant in drawn],
        "room_of": [mutant.room for mutant in drawn],
    }


def settle(copy: Copy, files: Sequence[str], order: Sequence[str], limit: float, steady: Callable[[str], bool]) -> Any:
    """Run a mutant's tests; a failure of a test that is not `steady` counts only if it repeats on the same mutant.

    A test is not steady if it does not run the changed line, or starts processes, which a busy machine may delay.

    Returns:
        The outcome, and the tests whose failures did not repeat. After three of these the mutant counts as survived.
    """
    unsteady: list[str] = []
    while True:
        outcome = copy.run(files, order, limit)
        if outcome.status != "failed" or steady(outcome.by):
            return outcome, unsteady
        if copy.run([outcome.by] if "::" in outcome.by else files, order, limit).status != "passed":
            return outcome, unsteady
        unsteady.append(outcome.by)
        if len(unsteady) == 3:
            return dataclasses.replace(outcome, status="passed", by="", why=""), unsteady


class Proof:
    """The measurements of the clean tree, the results, and the copies in which mutants run."""

    def __init__(self, out: Path, copies: Sequence[Copy]) -> None:
        self.out, self.clean = out, out.with_suffix(".clean.jsonl")
        self._all, self._copies = copies, queue.Queue[Copy]()
        for copy in copies:
            self._copies.put(copy)
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(copies))
        self._files: dict[str, TestFile] = {}
        self.equivalent = known_equivalents(EQUIVALENT.read_text(encoding="utf-8"))

    def measure(self, mutants: Iterable[Mutant]) -> None:
        """Check that the clean tree passes the tests of these mutants; measure which lines they run and their times.

        Raises:
            RuntimeError: a test fails.
        """
        names = {name for mutant in mutants for name in mutants_tests.test_files(ROOT, mutant.path, mutant.room)}
        names.update(name for mutant in mutants for name in mutants_tests.room_tests(ROOT, mutant.room))
        digests = {name: mutants_tests.digest(ROOT, name) for name in sorted(names)}
        for entry in read_lines(self.clean):
            if entry["kind"] == "file" and digests.get(entry["path"]) == entry["digest"]:
                fields = {field.name: entry[field.name] for field in dataclasses.fields(TestFile)}
                fields["lines"] = {module: {int(line): tests for line, tests in lines.items()}
                                   for module, lines in entry["lines"].items()}  # fmt: skip
                self._files[entry["path"]] = TestFile(**fields)
        missing = [name for name in digests if name not in self._files]
        bar = tqdm(total=len(missing), desc="clean tests", unit="file", disable=not missing)
        for file in self._each(lambda copy, name: mutants_tests.measure(copy, name, PATIENCE), missing):
            append_line(self.clean, {"kind": "file", **dataclasses.asdict(file)})
            self._files[file.path] = file
            bar.update()
        bar.close()

    def limits(self, mutants: Iterable[Mutant]) -> dict[str, float]:
        """Run each room's tests clean, in another order and without coverage; return each mutant's time limit.

        Raises:
            RuntimeError: a test fails that passed under coverage and in another order.
        """
        room_files = {mutant.room: mutants_tests.room_tests(ROOT, mutant.room) for mutant in mutants}
        digests = {room: " ".join(self._files[name].digest for name in names) for room, names in room_files.items()}
        seconds = {entry["room"]: entry["seconds"] for entry in read_lines(self.clean)
                   if entry["kind"] == "room" and digests.get(entry["room"]) == entry["digest"]}  # fmt: skip

        def control(copy: Copy, room: str) -> tuple[str, float]:
            files = [self._files[name] for name in room_files[room]]
            tests = sorted((cost, test) for file in files for cost, test in zip(file.seconds, file.tests, strict=True))
            outcome = copy.run(room_files[room], [test for _, test in tests], 3 * PATIENCE)
            if outcome.status != "passed":
                raise RuntimeError(f"{outcome.by or room} does not pass on the clean tree: {outcome.why}")
            return room, outcome.elapsed

        for room, elapsed in self._each(control, [room for room in room_files if room not in seconds]):
            seconds[room] = elapsed
            append_line(self.clean, {"kind": "room", "room": room, "digest": digests[room], "seconds": elapsed})
            tqdm.write(f"the clean tests of {room} take {elapsed:.0f} s", file=sys.stderr)
        return {mutant.key: max(LEAST, GENEROUS * self._clean_seconds(mutant, seconds)) for mutant in mutants}

    def _clean_seconds(self, mutant: Mutant, rooms: Mapping[str, float]) -> float:
        """Return the time of all clean tests that a mutant could run, because compiling again may take longer."""
        if mutant.room in NEVER_COMPILES:
            source = (ROOT / mutant.path).read_text(encoding="utf-8")
            return sum(sum(self._files[name].seconds) for name in self._plan(mutant, source)[0])
        own = mutants_tests.room_tests(ROOT, mutant.room)
        mine = mutants_tests.test_files(ROOT, mutant.path, mutant.room)
        return rooms[mutant.room] + sum(sum(self._files[name].seconds) for name in mine if name not in own)

    def _plan(self, mutant: Mutant, source: str) -> tuple[list[str], list[str], bool]:
        mine = mutants_tests.test_files(ROOT, mutant.path, mutant.room)
        return mutants_tests.plan(mutant, source, [self._files[name] for name in mine])

    def close(self) -> None:
        """Start nothing more, and kill what is running."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for copy in self._all:
            copy.close()
        self._pool.shutdown()

    def run(self, mutants: Sequence[Mutant], limits: Mapping[str, float]) -> None:
        """Run mutants, record how each ends, and print the survivors."""
        bar = tqdm(total=len(mutants), desc="mutants", unit="mutant", smoothing=0)
        for entry in self._each(lambda copy, mutant: self._one(copy, mutant, limits[mutant.key]), mutants):
            append_line(self.out, entry)
            if entry["status"] not in ("killed", "timeout"):
                tqdm.write(f"{entry['status']}: {describe(entry)}", file=sys.stderr)
            bar.update()
        bar.close()

    def _one(self, copy: Copy, mutant: Mutant, limit: float) -> dict[str, Any]:
        source, text = (ROOT / mutant.path).read_text(encoding="utf-8"), mutants_draw.mutated(ROOT, mutant)
        assert text is not None, mutant
        before, after = mutants_draw.changed_line(source, text)
        entry = {"kind": "result", "key": mutant.key, "room": mutant.room, "path": mutant.path, "line": mutant.line,
                 "operator": mutant.operator, "before": before, "after": after, "covered": True}  # fmt: skip
        if (mutant.path, mutant.operator, after) in self.equivalent:
            return {**entry, "status": "equivalent", "by": "", "why": "", "seconds": 0.0}
        files, order, covered = self._plan(mutant, source)
        started = time.monotonic()
        copy.write(mutant.path, text)
        try:
            outcome, unsteady = settle(copy, files, order, limit, lambda test: test in order and not self._spawns(test))
        finally:
            copy.write(mutant.path, source)
        status = {"passed": "survived", "failed": "killed"}.get(outcome.status, outcome.status)
        return {**entry, "covered": covered, "status": status, "by": outcome.by, "why": outcome.why,
                "seconds": round(time.monotonic() - started, 1), "first": len(order), "files": files,
                "unsteady": unsteady}  # fmt: skip

    def _spawns(self, test: str) -> bool:
        text = self._files[test.split("::")[0]].text
        return any(word in text for word in mutants_tests.SPAWNS)

    def _each(self, function: Any, items: Sequence[Any]) -> Iterable[Any]:
        """Yield the results of `function(copy, item)` as they come; the first error ends all."""

        def lend(item: Any) -> Any:
            copy = self._copies.get()
            try:
                return function(copy, item)
            finally:
                self._copies.put(copy)

        futures = [self._pool.submit(lend, item) for item in items]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def prove(options: argparse.Namespace, folder: Path) -> None:
    """Draw, print and run the sample."""
    drawn, entry = draw_sample(options.rooms, options.sample, options.seed)
    for number, mutant in enumerate(drawn, 1):
        source, text = (ROOT / mutant.path).read_text(encoding="utf-8"), mutants_draw.mutated(ROOT, mutant)
        before, after = mutants_draw.changed_line(source, text or "")
        shown = {"path": mutant.path, "line": mutant.line, "operator": mutant.operator}
        print(f"{number:4} {describe({**shown, 'before': before, 'after': after})}")
    print(f"{len(drawn)} drawn of {sum(entry['rooms'].values())} mutants, by room {entry['rooms']}")
    print(f"left out before, as they cannot change what the code does: {entry['left_out']}", flush=True)
    if options.draw_only:
        return
    append_line(options.out, entry)
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ROOT / ".jax_cache"))
    copies = [Copy(ROOT, folder / str(number), cache) for number in range(options.jobs)]
    proof = Proof(options.out, copies)
    results = newest(read_lines(options.out), proof.equivalent)
    wanted = set(remaining(entry["keys"], results, options.rerun))
    mutants = [mutant for mutant in drawn if mutant.key in wanted]
    try:
        for room in dict.fromkeys(mutant.room for mutant in mutants):
            mine = [mutant for mutant in mutants if mutant.room == room]
            proof.measure(mine)
            proof.run(mine, proof.limits(mine))
    finally:
        proof.close()


def main() -> int:
    """Run the proof, or print its table, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=300, help="the minimum number of mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the results, one JSON line each")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rooms", nargs="+", choices=mutants_draw.ROOMS, default=list(mutants_draw.ROOMS))
    parser.add_argument("--rerun", nargs="+", choices=STATUSES, default=[], help="run these again")
    parser.add_argument("--draw-only", action="store_true", help="print the sample and end")
    parser.add_argument("--table", type=Path, help="print the results of this file and end")
    options = parser.parse_args()
    if not (options.table or options.out or options.draw_only):
        parser.error("say where the results go: --out FILE.jsonl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not options.table:
        folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        try:
            prove(options, folder)
        except RuntimeError as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            return 1
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not options.draw_only:
        equivalent = known_equivalents(EQUIVALENT.read_text(encoding="utf-8"))
        print(table(read_lines(options.table or options.out), equivalent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
