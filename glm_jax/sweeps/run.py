"""`glm-jax sweep`: train the members of an ablation in groups, a process each, and collect results in a workdir.

Each process trains one group on one core: small models gain nothing from a second core, and results then do not depend
on the number of processes. A group is done when all its members have a result. A sweep that was interrupted or killed
resumes with the groups that are not done, each with the same members as before and from the steps that it has kept
(unfinished.py), so that its numbers are those of a sweep that was never stopped.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from tqdm import tqdm

from glm_jax import signals
from glm_jax.config import Experiment, by_key
from glm_jax.config.fields import in_section
from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic
from glm_jax.sweeps import members as sweep_members
from glm_jax.sweeps import results
from glm_jax.sweeps.members import Group, Member, Sweep
from glm_jax.types import Json

DONE, STOPPED = 0, 3  # exit codes
FREE_KEYS = ("data.cache",)  # may differ when a sweep resumes

Say = Callable[[str], None]


def train_all(base: Experiment, path: Path, workdir: Path, parallel: int, say: Say, only: str = "") -> int:
    """Train the members of a sweep that have no result yet.

    Args:
        base: resolved, the config that members change.
        path: of the ablation's file, which names the changes.
        workdir: created if it does not exist; resumed if it holds the same sweep.
        parallel: processes at a time.
        say: called with one line at a time.
        only: see `members.chosen`.

    Returns:
        The exit code: 0, or 3 if asked to stop.

    Raises:
        UserError: the sweep, its data or the workdir is not valid, before any training; or the process of a group
            failed, after the others are done.
    """
    from glm_jax.workdir.folder import check_writable, lock  # imports jax, which `listing` does not need

    sweep = sweep_members.load(path)
    members = sweep_members.expand(base, sweep)
    groups = sweep_members.chosen(sweep_members.group(members), only)
    check_writable(workdir)
    description = _describe(path, base, sweep, members)
    _check_same(workdir, description)
    description["data"] = _prepare(members, say)
    with lock(workdir):
        try:
            return _run(workdir, description, groups, parallel, say)
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be written to ({error.strerror}): make room, and the same "
                            "command resumes") from error  # fmt: skip


def _run(workdir: Path, description: Json, groups: Sequence[Group], parallel: int, say: Say) -> int:
    _check_same(workdir, description)
    if not (workdir / results.DESCRIPTION).exists():
        write_atomic(workdir / results.DESCRIPTION, json.dumps(description, indent=1) + "\n")
    waiting = [group for group in groups if results.missing(workdir, group.members)]
    for member in (member for group in waiting for member in group.members):
        results.member_path(workdir, member.name).unlink(missing_ok=True)  # its group is not done
    results.write_tables(workdir)
    if len(waiting) < len(groups):
        say(f"{len(groups) - len(waiting)} of {len(groups)} groups are done; resuming with the others")
    failed = _Pool(workdir, waiting, parallel, say).go()
    if failed is None:
        say(f"stopped: what is done is kept in {workdir}; the same command resumes from there")
        return STOPPED
    if failed:
        raise UserError(f"{len(failed)} of {len(waiting)} groups failed, the first is {failed[0]}: fix what its log "
                        "says, and the same command tries them again")  # fmt: skip
    say(f"done: {workdir / results.TABLE}")
    return DONE


def listing(base: Experiment, path: Path, only: str = "") -> Iterator[str]:
    """Yield what a sweep would train: a line for each group, and a line for each of its members.

    Raises:
        UserError: the sweep is not valid.
    """
    members = sweep_members.expand(base, sweep_members.load(path))
    groups = sweep_members.chosen(sweep_members.group(members), only)
    count = sum(len(group.members) for group in groups)
    yield f"{path}: {count} members in {len(groups)} groups"
    for group in groups:
        yield f"{group.name}: {len(group.members)} members, {group.steps} steps"
        for member in group.members:
            yield f"  {member.name}"


def _numbers(base: Experiment) -> Json:
    plain = json.loads(json.dumps(by_key(base)))
    return {key: value for key, value in plain.items() if not in_section(key, FREE_KEYS)}


def _check_same(workdir: Path, description: Json) -> None:
    """Check that the workdir holds no other sweep or data; another rule is fine, as old curves are judged again."""
    if not (workdir / results.DESCRIPTION).exists():
        return
    before = results.read_description(workdir)
    for what in ("base", "axes", "members", "data"):
        value = description.get(what, before.get(what))  # data is known only after it is prepared
        if before.get(what) == value:
            continue
        hint = ""
        if what == "base":
            now, old = description[what], before.get(what, {})
            key = min(key for key in now.keys() | old.keys() if now.get(key) != old.get(key))
            hint = f" ({key} was {old.get(key)!r}, it is {now.get(key)!r})"
        if what == "data":
            hint = " (its texts or its tokenizer have changed)"
        raise UserError(f"{workdir} holds a sweep with other {what}{hint}: set it back, or name another --workdir")


def _prepare(members: Sequence[Member], say: Say) -> list[Json]:
    """Prepare all data before any process needs it, so that errors show first. Return its digests."""
    from glm_jax.sweeps.group import prepare_all

    prepared = prepare_all([member.config for member in members], say)
    return [{"tokenizer": data.tokenizer.digest, "sources": data.digests} for data in prepared.values()]


def _describe(path: Path, base: Experiment, sweep: Sweep, members: Sequence[Member]) -> Json:
    """Return the contents of sweep.json, without its data."""
    packages = ("glm-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    description = {
        "title": docstring.partition("\n")[0].rstrip("."),
        "file": str(path),
        "command": " ".join(["glm-jax", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        **results.rule(),
        "base": _numbers(base),
        "axes": sweep,
        "members": [member.name for member in members],
    }
    return json.loads(json.dumps(description, default=dict))  # as it is read back; an axis may set a source's section


def _commit() -> str | None:
    """Return the commit of the working tree, with a + if files differ from it; None without a commit."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None


@dataclasses.dataclass
class _Pool:
    """Processes that train the groups in turn."""

    workdir: Path
    groups: Sequence[Group]
    parallel: int
    say: Say

    def __post_init__(self) -> None:
        self._stopping = False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        total = sum(group.steps * len(group.members) for group in self.groups)
        self._bar = tqdm(total=total, unit="step", disable=not self.groups, smoothing=0.05, mininterval=1)

    def go(self) -> list[str] | None:
        """Train all groups. Return the logs of those that failed, or None if asked to stop."""
        with signals.handled(self._stop), self._bar, concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            waiting = [pool.submit(self._train, group) for group in self.groups]
            # With a timeout: a signal just before a wait does not end it, and Python runs its handler only afterwards.
            while concurrent.futures.wait(waiting, timeout=1).not_done:
                pass
            failed = [future.result() for future in waiting]
        return None if self._stopping else [log for log in failed if log]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for process in tuple(self._running):
            process.kill()

    def _train(self, group: Group) -> str | None:
        """Train one group in a process of its own. Return its log if that failed."""
        if self._stopping:
            return None
        started = time.monotonic()
        log = self.workdir / results.LOGS / f"{group.name.replace(' ', '-')}.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as errors:
                code = self._work(group, errors)
            if code and not self._stopping:
                self._report(f"{group.name}: failed with exit code {code}, see {log}")
                return str(log)
            if self._stopping:
                return None
            with self._lock:
                rows = results.write_tables(self.workdir)
        except (OSError, UserError) as error:  # such as a full disk: the other groups continue
            self._report(f"{group.name}: {error}")
            return str(log)
        names = {member.name for member in group.members}
        diverged = sum(row["status"] == "diverged" for row in rows if row["name"] in names)
        self._report(f"{group.name}: {len(names)} members in {time.monotonic() - started:.0f} s, {diverged} diverged")
        return None

    def _work(self, group: Group, errors: TextIO) -> int:
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "NPROC": "1"}  # threads of XLA on the CPU
        with signals.blocked():
            process = subprocess.Popen(
                [sys.executable, "-m", "glm_jax.sweeps.worker"], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._running.add(process)
        try:
            if self._stopping:
                process.kill()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(group.to_json(self.workdir))
            for _ in process.stdout:
                self._bar.update(len(group.members))
            return process.wait()
        finally:
            self._running.discard(process)

    def _report(self, line: str) -> None:
        with self._bar.external_write_mode():
            self.say(line)
