"""Compiles in processes of their own, whose environment is set before jax is loaded.

python -m glm_jax.planning.worker < request.json > report.json
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator

from glm_jax import signals
from glm_jax.errors import UserError, WorkFailed
from glm_jax.planning import targets
from glm_jax.planning.compile import Report, Request, compile_here


def reports(requests: Iterable[Request], processes: int = 1) -> Iterator[Report]:
    """Compile every request in a process of its own, and yield the reports in order.

    Args:
        requests: read as processes become free.
        processes: at a time.

    Raises:
        UserError: the model or the batch of a request does not fit its mesh, or the mesh not its target.
        WorkFailed: a compiler failed.
    """
    running = deque[tuple[Request, subprocess.Popen[str]]]()
    try:
        for request in requests:
            running.append((request, _start(request)))
            if len(running) == processes:
                yield _finish(*running[0])
                running.popleft()
        while running:
            yield _finish(*running[0])
            running.popleft()
    finally:
        for _, process in running:
            process.kill()
            process.communicate()


def _start(request: Request) -> subprocess.Popen[str]:
    environment = targets.environment(request.find(), request.devices())
    with signals.blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "glm_jax.planning.worker"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(request.to_json()) + "\n")
    process.stdin.flush()
    return process


def _finish(request: Request, process: subprocess.Popen[str]) -> Report:
    output, errors = process.communicate()
    code, last = process.returncode, (errors.strip().splitlines() or ["it said nothing"])[-1]
    if code == 2:
        raise UserError(last.removeprefix("error: "))
    if code == -signal.SIGKILL:
        raise WorkFailed(f"compiling for {request.target} was killed: this machine may lack memory for it")
    if code:
        raise WorkFailed(f"compiling for {request.target} failed with exit code {code}: {last[:300]}")
    return Report.from_json(json.loads(output.splitlines()[-1]))


def main() -> int:
    """Compile the request given on standard input, print its report, and return the exit code."""
    try:
        report = compile_here(Request.from_json(json.loads(sys.stdin.readline())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
