"""Run pytest for mutants.py: measure which test runs which line, and run the tests most likely to fail first.

This is also a pytest plugin (`-p tests.proofs.mutants_tests`). MUTANTS_PLAN is the path of a JSON file with its
instructions: `order`, node ids in the order in which to run them (others come after, by file); `measure`, whether
coverage runs; `report`, where to write the results.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.proofs import mutants_draw
from tests.proofs.mutants_draw import Mutant

ROOM_TESTS = {name: f"tests/{'data' if name == 'rows' else name}/test_*.py" for name in mutants_draw.ROOMS}
# Tests in other folders that were written for these modules as much as for their own room.
ELSEWHERE = (
    ("glm_jax/parallel/*.py", "tests/training/test_step*.py"),  # the step's tests run again on a mesh
    ("glm_jax/model/layers.py", "tests/parallel/test_pipeline.py"),  # a layer's parts over the tensor axis
    ("glm_jax/config/model.py", "tests/end_to_end/test_train.py"),  # the section of an experiment
    ("glm_jax/engine/*.py", "tests/parallel/test_mesh.py"),
    ("glm_jax/engine/*.py", "tests/parallel/test_pipeline.py"),  # every mesh, zero=3 among them
    ("glm_jax/training/run.py", "tests/end_to_end/test_train.py"),
    ("glm_jax/training/run.py", "tests/end_to_end/test_resumes.py"),
    ("glm_jax/training/stretch.py", "tests/end_to_end/test_resumes.py"),
    ("glm_jax/workdir/folder.py", "tests/end_to_end/test_resumes.py"),
    ("glm_jax/workdir/events.py", "tests/end_to_end/test_train.py"),
)
SPAWNS = ("subprocess", "multiprocessing")
IMPORTED = -1  # in place of a test in the map of lines: the line runs while the file is imported
COVERAGE = """
[run]
data_file = {folder}/coverage
parallel = true
relative_files = true
source = glm_jax
context = ${{MUTANTS_TEST-}}
sigterm = true
disable_warnings = no-data-collected,module-not-measured,module-not-imported
"""


class Plugin:
    """Order the tests, record their results, and tell coverage which test is running."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.failed: list[tuple[str, str]] = []

    @pytest.hookimpl(trylast=True)  # after pytest has grouped tests by fixture
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ranks = {name: rank for rank, name in enumerate(self.plan["order"])}
        items.sort(key=lambda item: ranks.get(item.nodeid, len(ranks)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        os.environ["MUTANTS_TEST"] = item.nodeid  # the context of the processes that the test starts
        self._switch(item.nodeid)
        result = yield
        self._switch("")
        return result

    def _switch(self, context: str) -> None:
        if self.plan["measure"]:
            import coverage  # pyright: ignore[reportMissingImports]  (an extra)

            running = coverage.Coverage.current()
            assert running is not None, "coverage was not started with the interpreter"
            running.switch_context(context)

    def _note(self, name: str, report: Any) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        self.failed.append((name, (crash.message if crash else str(report.longrepr))[:300]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self._note(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, report)

    def pytest_sessionfinish(self) -> None:
        package = sys.modules.get("glm_jax")
        said = {"seconds": self.seconds, "failed": self.failed, "package": package and package.__file__}
        Path(self.plan["report"]).write_text(json.dumps(said), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    plan = os.environ.pop("MUTANTS_PLAN", None)  # not for a pytest that a test starts
    if plan:
        config.pluginmanager.register(Plugin(json.loads(Path(plan).read_text(encoding="utf-8"))))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run of pytest ended: `status` is passed, failed, timeout or broken (which says nothing about the code)."""

    status: str
    by: str
    why: str
    elapsed: float
    seconds: dict[str, float]


class Copy:
    """A private copy of the tree, which holds one mutant at a time."""

    def __init__(self, root: Path, folder: Path, cache: Path) -> None:
        self.root, self.folder, self._cache = folder / "tree", folder, cache
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._closed = threading.Lock(), False
        self._stamp = int(time.time()) - 10**6
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (root / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, self.root / name)

    def write(self, path: str, text: str) -> None:
        """Write a module with a new modification time: bytecode is cached by time and size."""
        self._stamp += 10
        (self.root / path).write_text(text, encoding="utf-8")
        os.utime(self.root / path, (self._stamp, self._stamp))

    def run(self, files: Sequence[str], order: Sequence[str], limit: float, measure: bool = False) -> Outcome:
        """Run test files until the first failure, in a session of its own, and leave nothing running."""
        plan, report, temporary = (self.folder / name for name in ("plan.json", "report.json", "tmp"))
        said = {"order": list(order), "measure": measure, "report": str(report)}
        plan.write_text(json.dumps(said), encoding="utf-8")
        report.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        environment |= {
            "PYTHONPATH": str(self.root),
            "MUTANTS_PLAN": str(plan),
            "JAX_COMPILATION_CACHE_DIR": str(self._cache),  # unchanged programs are not compiled again
        }
        if measure:
            (self.folder / "coverage.ini").write_text(COVERAGE.format(folder=self.folder), encoding="utf-8")
            environment["COVERAGE_PROCESS_START"] = str(self.folder / "coverage.ini")
        flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "tests.proofs.mutants_tests", "--hypothesis-seed=0"]
        command = [sys.executable, "-m", "pytest", *flags, f"--basetemp={temporary}", *files]
        started = time.monotonic()
        with open(self.folder / "output", "wb") as output, self._lock:
            if self._closed:
                raise RuntimeError("stopped")
            self._process = process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.stop()
        elapsed = time.monotonic() - started
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)  # examples of one mutant must not reach the next
        return self._outcome(code, report, elapsed)

    def stop(self) -> None:
        """Kill what the last run started and left running."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Start nothing more, and kill what is running."""
        with self._lock:
            self._closed = True
        self.stop()

    def _outcome(self, code: int | None, report: Path, elapsed: float) -> Outcome:
        if code is None:
            return Outcome("timeout", "", "", elapsed, {})
        said = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        tail = (self.folder / "output").read_text(encoding="utf-8", errors="replace")[-1500:]
        if said.get("package") and not said["package"].startswith(str(self.root)):
            return Outcome("broken", "", f"the tests saw {said['package']}", elapsed, {})
        if code == 0:
            return Outcome("passed", "", "", elapsed, said["seconds"])
        if code < 0:
            return Outcome("failed", "", f"signal {-code}", elapsed, {})
        if said.get("failed"):
            by, why = said["failed"][0]
            return Outcome("failed", by, why, elapsed, said["seconds"])
        return Outcome("broken", "", f"pytest ended with {code}: {tail}", elapsed, {})


@dataclasses.dataclass(frozen=True)
class TestFile:
    """A test file on the clean tree: its tests and their seconds, and which of them run which line of a module."""

    __test__ = False

    path: str
    digest: str
    text: str
    tests: list[str]
    seconds: list[float]
    lines: dict[str, dict[int, list[int]]]  # by module; tests by number, or IMPORTED

    def names(self, module: str) -> int:
        """Return how close the file is to a module: 0 if it has its tests, 1 if it imports it, 2 otherwise."""
        stem = Path(module).stem
        if Path(self.path).stem.startswith(f"test_{stem}"):
            return 0
        package = ".".join(Path(module).parent.parts)
        return 1 if f"{package}.{stem}" in self.text or f"from {package} import" in self.text else 2


def room_tests(root: Path, room: str) -> list[str]:
    """Return a room's own test files."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(ROOM_TESTS[room]))


def test_files(root: Path, module: str, room: str) -> list[str]:
    """Return the test files that mutants of a module may run."""
    patterns = [tests for modules, tests in ELSEWHERE if Path(module).match(modules)]
    elsewhere = {path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern)}
    return sorted({*room_tests(root, room), *elsewhere})


def digest(root: Path, path: str) -> str:
    """Return a digest of everything a test file's coverage depends on: the code, the tests' helpers, and the file."""
    code = [*root.glob("glm_jax/**/*.py"), *root.glob("tests/**/*.py")]
    helpers = [other for other in code if not other.name.startswith("test_") and "proofs" not in other.parts]
    hashed = hashlib.sha256()
    for one in [*sorted(helpers), root / path]:
        hashed.update(one.relative_to(root).as_posix().encode() + one.read_bytes())
    return hashed.hexdigest()[:16]


def measure(copy: Copy, path: str, limit: float) -> TestFile:
    """Run a test file on the clean tree under coverage, including the processes that it starts.

    Raises:
        RuntimeError: a test fails.
    """
    text, digested = (copy.root / path).read_text(encoding="utf-8"), digest(copy.root, path)
    outcome = copy.run([path], [], limit, measure=True)
    if outcome.status != "passed":
        raise RuntimeError(f"{outcome.by or path} does not pass on the clean tree ({outcome.status}): {outcome.why}")
    tests = list(outcome.seconds)
    numbers = {name: number for number, name in enumerate(tests)} | {"": IMPORTED}
    lines: dict[str, dict[int, set[int]]] = {}
    import coverage  # pyright: ignore[reportMissingImports]

    wanted = {module for room in mutants_draw.ROOMS for module in mutants_draw.modules(copy.root, room)}
    for name in copy.folder.glob("coverage.*"):
        if name.suffix == ".ini":
            continue
        data = coverage.CoverageData(basename=str(name))
        try:
            data.read()
        except coverage.CoverageException:  # its process was killed while it wrote
            name.unlink()
            continue
        for module in wanted & data.measured_files():
            for line, contexts in data.contexts_by_lineno(module).items():
                lines.setdefault(module, {}).setdefault(line, set()).update(
                    numbers.get(one, IMPORTED) for one in contexts
                )
        name.unlink()
    ordered = {module: {line: sorted(those) for line, those in found.items()} for module, found in lines.items()}
    return TestFile(path, digested, text, tests, list(outcome.seconds.values()), ordered)


def _statement(source: str, line: int) -> tuple[range, set[int]]:
    """Return the lines of the statement at `line` (its head, if compound), and the lines that depend on it at import.

    The latter are the body of the function or class that it heads or is part of or, for an assignment to a name, the
    lines that use the name. Tests that run these lines may detect a change.
    """
    tree = ast.parse(source)
    best: ast.stmt | None = None
    inside: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        decorators = getattr(node, "decorator_list", [])
        first, last = min([node.lineno, *(one.lineno for one in decorators)]), node.end_lineno or node.lineno
        if first <= line <= last:
            best = node  # ast.walk goes from the outside in
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = set(range(node.body[0].lineno, last + 1))
    if best is None:
        return range(line, line + 1), inside
    first = min([best.lineno, *(one.lineno for one in getattr(best, "decorator_list", []))])
    body = getattr(best, "body", None)
    last = max(line, body[0].lineno - 1) if body else best.end_lineno or line
    if not inside:
        bound = {node.id for node in ast.walk(best) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        inside = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in bound}
    return range(first, last + 1), inside


def plan(mutant: Mutant, source: str, files: Iterable[TestFile]) -> tuple[list[str], list[str], bool]:
    """Choose and order tests: first those that run the changed line, then the rest of their files.

    Later tests of a file reuse what a test compiles or computes: they depend on the line without running it, hence the
    rest. Files are ordered by the time of their tests, times how close they are to the module.

    Returns:
        The files, the node ids to run first, and whether any test runs the line. If none does, the files are the
        module's own and those that start processes, some of which end before coverage is written.
    """
    lines, inside = _statement(source, mutant.line)
    first: list[tuple[float, str, list[str]]] = []
    last: list[tuple[float, str, list[str]]] = []
    for file in files:
        found = file.lines.get(mutant.path, {})
        hits = {test for line in lines for test in found.get(line, [])}
        running = hits - {IMPORTED}
        if IMPORTED in hits:
            running |= {test for line in inside for test in found.get(line, [])} - {IMPORTED}
        tests = sorted(running, key=lambda test: file.seconds[test])
        cost = sum(file.seconds[test] for test in tests or range(len(file.tests))) * (1 + file.names(mutant.path))
        if hits:
            (first if tests else last).append((cost, file.path, [file.tests[test] for test in tests]))
    if not first and not last:
        near = [file for file in files if file.names(mutant.path) == 0 or any(word in file.text for word in SPAWNS)]
        return [file.path for file in sorted(near, key=lambda file: sum(file.seconds))], [], False
    chosen = sorted(first) + sorted(last)
    return [path for _, path, _ in chosen], [test for _, _, tests in chosen for test in tests], True
