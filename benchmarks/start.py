"""Time starts of `glm-jax`: to the first step of training, to the first token of a fill, and to the line of a mistake.

    python benchmarks/start.py [--rounds 5] [--against CHECKOUT] [--train] [--generate] [--mistakes]

Each is a whole process, started as a user starts it: the data are cached, and compiled programs are where the commit
keeps them by default. `--against` names a checkout of another commit. The lines are medians of seconds with the
smallest and the largest round, and ratios of wall-clock and CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import rounds
import shared
from rounds import Measured, clock, compare, interval

OURS, AGAINST = "ours", "the other commit"
TRAIN = ("train", "--config=quickstart", "--config.train.log_every=1")
MISTAKES = {
    "train": ("--config=quickstart", "--workdir=/dev/null/run"),
    "generate": ("--workdir=/nowhere", "--prompt=a"),
    "convert": ("sat-to-orbax", "--path=/nowhere", "--out=/nowhere/else"),
    "corpus": ("build", "--config=quickstart", "--config.data.sources.en.path=/nowhere"),
    "config": ("show", "--config=quickstart", "--config.nothing=1"),
    "schedule": ("--stages=0",),
    "report": ("--workdir=/nowhere",),
    "sweep": ("--config=quickstart", "--workdir=/nowhere"),
}


def start(*arguments: str, until: str = "", code: int = 0) -> None:
    """Run a command to its end, or until a line has `until`; then it is killed. Its exit code must be `code`."""
    command = [sys.executable, "-P", "-u", "-m", "glm_jax", *arguments]  # -P: not the glm_jax of the current directory
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = list[str]()
        for line in process.stdout:
            said.append(line)
            if until and until in line:
                process.kill()
                return
    if until or process.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)}")


def serve(options: argparse.Namespace) -> None:
    """Be a side, with the glm_jax that this process finds."""

    def turn() -> dict[str, float]:
        parts: dict[str, float] = {}
        if options.train:
            with tempfile.TemporaryDirectory() as workdir:
                parts |= clock("first step", lambda: start(*TRAIN, f"--workdir={workdir}", until=" step 1/"))
        if options.generate:
            fill = ("generate", f"--workdir={options.folder / 'run'}", "--prompt=The [gMASK]", "--max_tokens=1")
            parts |= clock("first token", lambda: start(*fill, until="The"))
        if options.mistakes:
            for command, arguments in MISTAKES.items():
                work = lambda command=command, arguments=arguments: start(command, *arguments, code=2)  # noqa: E731
                parts |= clock(f"mistake of {command}", work)
        return parts

    turn()  # fills the cache of compiled programs
    rounds.serve(turn, warm=False)


def report(measured: dict[str, Measured]) -> None:
    """Print a line for each part of each side."""
    base = measured[OURS]
    for part in (name for name in base.turns[0].parts if not name.endswith("_cpu")):
        for name, side in measured.items():
            print(f"{part}, {name}: {interval(side.seconds(part))} s, {interval(side.cpu_seconds(part))} CPU s")
            if name != OURS:
                print(compare(measured, name, OURS, part))


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    parser = shared.parser(__doc__, {})
    shared.add_against(parser)
    kinds = ("train", "generate", "mistakes")
    for kind in kinds:
        parser.add_argument(f"--{kind}", action="store_true", help="only what is named; by default all three")
    options = parser.parse_args(words)
    if not any(getattr(options, kind) for kind in kinds):
        options.train = options.generate = options.mistakes = True
    if options.folder:
        return serve(options)
    trees = {OURS: rounds.TREE} | ({AGAINST: options.against} if options.against else {})
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": f"{folder}/cache"}
        sides = [
            rounds.script(name, __file__, *words, "--folder", folder, tree=tree, environment=cache)
            for name, tree in trees.items()
        ]
        for name in [name for name in os.environ if name.startswith(("JAX_", "GLM_JAX_", "GLIBC_"))]:
            del os.environ[name]
        # the older commit makes the workdir, which the newer one can read, and fills the cache
        os.environ |= sides[-1].environment
        start(*TRAIN, f"--workdir={folder}/run", "--config.train.steps=1", "--config.train.eval_every=0")
        report(rounds.measure(sides, options.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
