"""The files in a sweep's workdir, and the tables made from them.

    sweep.json              the sweep: base config, axes, rule of divergence, steps; written once
    members/<name>.json     the result of a member with its curves, written whole when its group is done
    logs/<group>.log        the output of a group's process
    results.json, results.md    all results so far, rewritten whenever a group ends

A member's `curves` hold `loss` at every step, and the other metrics at the steps in `step`; its `run` holds what
depends on the clock, which the tables leave out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic
from glm_jax.sweeps import verdict as sweep_verdict
from glm_jax.sweeps.members import Member
from glm_jax.types import Json

DESCRIPTION, MEMBERS, LOGS, UNFINISHED = "sweep.json", "members", "logs", "unfinished"
RESULTS, TABLE = "results.json", "results.md"
DIGITS = 9  # significant digits of a saved number: enough to read a float32 back exactly

Row = Json  # a member's result, or a line of results.json


def member_path(workdir: Path, name: str) -> Path:
    """Return the path of a member's result."""
    return workdir / MEMBERS / f"{name}.json"


def number(value: float) -> float | None:
    """Return a number as it is saved: rounded to DIGITS, None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def save_member(workdir: Path, result: Row) -> None:
    """Write a member's result, whole or not at all."""
    write_atomic(member_path(workdir, result["name"]), json.dumps(result, allow_nan=False) + "\n")


def read_member(path: Path) -> Row:
    """Read a member's result; its curves have NaN where a value was not finite.

    Raises:
        UserError: it is damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        curves = result["curves"]
        result["curves"] = {name: np.array(values, np.float64) for name, values in curves.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: delete it, and the same sweep trains it again") from error
    return result


def read_all(workdir: Path) -> list[Row]:
    """Read all results of a sweep so far, in the order of its members.

    Raises:
        UserError: the folder holds no sweep, or a result is damaged.
    """
    description = read_description(workdir)
    paths = [member_path(workdir, name) for name in description["members"]]
    return [read_member(path) for path in paths if path.exists()]


def read_description(workdir: Path) -> Json:
    """Read sweep.json.

    Raises:
        UserError: it is missing or damaged.
    """
    path = workdir / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(description["members"], list):
            return description
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no sweep ({DESCRIPTION} is missing): check the path") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged: restore it, or name another --workdir")


def provenance(description: Json, rows: Sequence[Row]) -> str:
    """Return the source of results in Markdown: command, commits, jax, the number of members so far, steps."""
    commits = [*filter(None, dict.fromkeys(row.get("commit", description["commit"]) for row in rows))]
    short = ", ".join(f"`{commit[:12]}{'+' * commit.endswith('+')}`" for commit in commits)  # +: the tree had changes
    told = f"commit{'s' * (len(commits) > 1)} {short}" if commits else "no commit"
    return (
        f"`{description['command']}`, {told}, jax {description['versions']['jax']}; {len(rows)} of "
        f"{len(description['members'])} members, {steps_text(description['base'])}"
    )


def steps_text(base: Mapping[str, object]) -> str:
    """Return how long members of a sweep with this base train, in words."""
    return f"{base['train.steps']} steps of {base['train.global_batch']} rows of {base['data.seq_length']} tokens"


def rule() -> Json:
    """Return the rule of divergence as sweep.json has it, in numbers and in words."""
    return {"rule": sweep_verdict.RULE, "rule_text": sweep_verdict.__doc__}


def missing(workdir: Path, members: Iterable[Member]) -> bool:
    """Whether any of the members has no result yet, or a damaged one."""
    for member in members:
        try:
            read_member(member_path(workdir, member.name))
        except UserError:
            return True
    return False


def row(result: Row) -> Row:
    """Return a result without its curves and what depends on the clock, judged by the current rule."""
    verdict = judge_again(result)
    judged = {"status": verdict.status, "step": verdict.step, "reason": verdict.reason}
    return {name: value for name, value in result.items() if name not in ("curves", "run")} | judged


def judge_again(result: Row) -> sweep_verdict.Verdict:
    """Apply the rule of divergence to a saved curve."""
    losses = np.array(result["curves"]["loss"], np.float64)  # None, as saved, becomes NaN
    return sweep_verdict.judge(losses, result["warmup"], result["uniform"], result["unigram"])


def write_tables(workdir: Path) -> list[Row]:
    """Rewrite results.json and results.md from all results so far, and return the rows."""
    description, rows = read_description(workdir), [row(result) for result in read_all(workdir)]
    write_atomic(workdir / RESULTS, json.dumps(rows, indent=1) + "\n")
    total, there = len(description["members"]), len(rows)
    text = f"# {description['title']}\n\n{there} of {total} members are there.\n"
    if rows:
        text += f"\n{summary(rows)}\n\n## Members\n\n{members_table(rows)}\n"
    write_atomic(workdir / TABLE, text)
    return rows


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def members_table(rows: Sequence[Row]) -> str:
    """Return a table with a line for each member: its labels, its status, its losses."""
    axes = list(rows[0]["labels"])
    lines = [
        [*(row["labels"][axis] for axis in axes), _status(row), _shown(row["loss"]), _shown(row["heldout"].get("loss"))]
        for row in rows
    ]
    return table([*axes, "status", "training loss", "held-out loss"], lines)


def summary(rows: Sequence[Row]) -> str:
    """Return a table with a line for each combination of labels but the seed: how many finished, and how well.

    Losses are means over the seeds that finished, in nats a target token, with their spread if two or more finished
    (the standard deviation of the sample).
    """
    axes = [axis for axis in rows[0]["labels"] if axis != "seed"]
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row["labels"][axis] for axis in axes), []).append(row)
    skips = any(row.get("skipped") for row in rows)
    lines = []
    for labels, group in alike.items():
        finished = [row for row in group if row["status"] == "finished"]
        reasons = [row["reason"] for row in group if row["status"] == "diverged"]
        lines.append([
            *labels, f"{len(finished)} of {len(group)}",
            spread([row["loss"] for row in finished]),
            spread([row["heldout"]["loss"] for row in finished if row["heldout"].get("loss") is not None]),
            ", ".join(f"{reason} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons)),
            *([" / ".join(str(row["skipped"]) for row in group)] if skips else []),
        ])  # fmt: skip
    header = [*axes, "finished", "training loss", "held-out loss", "diverged"]
    return table([*header, "skipped steps, by seed"] if skips else header, lines)


def spread(values: Sequence[float]) -> str:
    """Return the mean of values and their spread as text; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _status(row: Row) -> str:
    return "finished" if row["status"] == "finished" else f"diverged at {row['step']}: {row['reason']}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
