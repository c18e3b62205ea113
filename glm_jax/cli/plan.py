"""`glm-jax plan`: what a run takes of devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli import common, plan_page, plan_search
from glm_jax.cli.common import say
from glm_jax.errors import UserError
from glm_jax.planning import targets

if TYPE_CHECKING:
    from glm_jax.config import Experiment
    from glm_jax.parallel.device_sheet import Device
    from glm_jax.planning.compile import Report, Request, Verdict
    from glm_jax.planning.remedies import Remedy
    from glm_jax.planning.targets import Target

WEIGHTS = ("float32", "float16", "bfloat16", "int8", "int4")


def run(arguments: Sequence[str]) -> int:
    """Estimate a run, and compile its step or inference from shapes alone: memory, speed, cost, what would fit."""
    values = _flags()
    if not common.parse(values, arguments, ["config"]):
        return 0
    _check(values)
    plan_page.check(values)
    sheets = (Path(values.sheet),) if values.sheet else ()
    target = targets.find(values.target, *sheets, compiled=values.compile)
    memory = target.memory if values.memory is None else targets.memory(values.memory)
    experiment = common.load(values)
    if values.search:
        return plan_search.run(values, experiment, target, memory, sheets)

    from glm_jax.cli import plan_inference
    from glm_jax.planning.compile import Request

    request = Request(experiment, values.target, sheets, memory)
    processes = max(1, (os.cpu_count() or 1) // 2)
    draw = functools.partial(plan_page.write, values, arguments, target, memory, experiment)
    if values.inference:
        return plan_inference.run(values, request, target, memory, processes, draw)
    return _training(values, request, target, memory, processes, draw)


def _training(
    values: flags.FlagValues, request: Request, target: Target, memory: int | None, processes: int, draw: plan_page.Draw
) -> int:
    """Estimate a training step, compile it unless --nocompile, and show both."""
    from glm_jax.cli import plan_estimate
    from glm_jax.planning import estimate, remedies, worker
    from glm_jax.planning.compile import verdict
    from glm_jax.planning.programs import pieces

    count, experiment = request.devices(), request.experiment
    estimated = estimate.plan(experiment, target.device or estimate.processor(*request.sheets), pieces(experiment))
    shown: dict[str, object] = {"estimate": estimated.to_json(), "parameters": estimated.total_parameters}
    if not values.json:
        print("\n".join(plan_estimate.table(estimated)), flush=True)
    if not values.compile:
        if values.json:
            print(json.dumps(shown))
        elif memory:
            print(fit(estimated.memory.total, memory))
        draw(estimated)
        return 0
    say(f"compiling for {count:,} x {values.target}, none of which is used; large models take a minute or two")
    (report,) = worker.reports([request])
    judged = verdict(report, memory) if memory else None
    found: list[Remedy] = []
    if judged and not judged.fits:
        say("it does not fit; compiling what might")
        found = remedies.search(request, report, judged.memory, _cost_on(target.device), processes, say)
    if values.json:
        changes = [dataclasses.asdict(remedy) for remedy in found]
        print(json.dumps({**shown, "compiled": [row(report, judged)], "remedies": changes}))
    else:
        print("\n".join(table(report, judged)))
        if judged and not judged.fits:
            print("\n".join(advice(report, found)))
    draw(estimated, [(report, judged)], found)
    return 0


def _flags() -> flags.FlagValues:
    values = common.flag_values("plan", "--config glm_130b --target a100-40gb")
    common.define_config(values)
    flags.DEFINE_string(
        "target",
        "cpu",
        "what to compile for: cpu, a GPU such as a100-40gb, or a slice of TPUs such as v5p:8x8x12",
        flag_values=values,
    )
    flags.DEFINE_string(
        "memory",
        None,
        "bytes of a device that arrays may take, such as 40GB (default: the target's; of a GPU, XLA's pool of 3/4)",
        flag_values=values,
    )
    common.define_path(values, "sheet", "a file of your own devices, beside those of device_sheet.toml")
    flags.DEFINE_enum(
        "inference",
        None,
        (*WEIGHTS, "any"),
        "plan inference with weights of this kind on the config's mesh; any: find the weights and the mesh that fit",
        flag_values=values,
    )
    for name, default, least, summary in (
        ("rows", 1, 1, "of inference: rows that each stage works on at a time"),
        ("room", None, 2, "of inference: tokens of a row, context and what is generated (default: data.seq_length)"),
        (
            "group",
            None,
            0,
            "of inference with int8 or int4: inputs that share a scale; 0 is all (default: 0 with int8, 128 with int4)",
        ),
    ):
        flags.DEFINE_integer(name, default, summary, lower_bound=least, flag_values=values)
    plan_search.define(values)
    flags.DEFINE_bool("compile", True, "--nocompile: the estimate alone, in seconds", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    plan_page.define(values)
    return values


def _check(values: flags.FlagValues) -> None:
    """Refuse flags that mean nothing here."""
    plan_search.check(values)
    for name in ("rows", "room", "group"):
        if values[name].present and not values.inference:
            raise UserError(f"--{name} is for --inference: add it, or leave --{name} out")
    if values.group is not None and values.inference not in ("int8", "int4", "any"):
        raise UserError(f"--group is for --inference int8, int4 or any, not {values.inference}")


def _cost_on(device: Device | None) -> Callable[[Experiment], float] | None:
    """Return what estimates the seconds of an experiment's step on a device, if nothing overlaps."""
    if device is None:
        return None

    from glm_jax.planning import estimate
    from glm_jax.planning.programs import pieces

    return lambda experiment: estimate.plan(experiment, device, pieces(experiment)).slowest.step_seconds


def row(report: Report, judged: Verdict | None) -> dict[str, object]:
    """Return what JSON says of a compiled program."""
    return {**report.to_json(), "verdict": dataclasses.asdict(judged) if judged else None}


def table(report: Report, judged: Verdict | None) -> Iterator[str]:
    """Yield the lines about a compiled program."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    yield f"{report.program} on {mesh}, compiled for {report.target} from shapes (jax {report.jax}); nothing ran"
    memory = report.memory
    if memory.temporaries is None:
        yield f"the compiler refuses it: it needs {memory.peak / 1e9:.2f} GB a device or more, and has less"
        return
    parts = (("arguments", memory.arguments), ("outputs", memory.outputs), ("temporaries", memory.temporaries))
    shown = ", ".join(f"{name} {(size or 0) / 1e9:.2f}" for name, size in parts)
    yield f"peak {memory.peak / 1e9:.2f} GB a device: {shown}"
    if judged is None:
        yield "the CPU's memory is no measure for other devices: give --memory, such as 40GB, or a --target"
    else:
        yield fit(memory.peak, judged.memory)
    if report.buffers:
        yield "largest arrays, GB a device each (those that are not needed at the same time share memory):"
    for buffer in report.buffers:
        times = f"{buffer.count} x " if buffer.count > 1 else ""
        made = ", ".join(filter(None, (buffer.operation, buffer.function, buffer.line)))
        yield f"  {times:>5}{buffer.bytes / 1e9:6.3f}  {buffer.shape:24}  {made}"
    if report.collectives:
        yield "collectives of a device by the trips of their loops (n: known only as it runs); MB if each runs once:"
    for one in report.collectives:
        trips = " x ".join("n" if count is None else str(count) for count in one.loops) or "once"
        yield f"  {trips:12} {one.axes or 'none':22} {one.kind:18} {one.count:3}  {one.bytes / 1e6:12,.3f}"
    yield (
        f"lowered in {report.lowering:.1f} s, compiled in {report.compiling:.1f} s, "
        f"{report.resident / 1e9:.2f} GB resident"
    )


def fit(peak: int, memory: int) -> str:
    """Return whether so many bytes fit in the memory of a device, as text."""
    word, left = ("fits", "to spare") if peak <= memory else ("does not fit", "too much")
    return f"memory {memory / 1e9:.2f} GB: {word}, {abs(memory - peak) / 1e9:.3f} GB {left}"


def advice(report: Report, found: Sequence[Remedy]) -> Iterator[str]:
    """Yield the lines about changes that would let a training step fit."""
    from glm_jax.planning.numbers import significant
    from glm_jax.planning.remedies import shown

    if not found:
        yield "no change of schedule, stash, microbatches or mesh on as many devices takes less memory"
        return
    fits = found[0].verdict.fits
    yield "with each of these it fits:" if fits else "these take less memory, but do not let it fit:"
    for remedy in found:
        peaks = f"peak {report.memory.peak / 1e9:.2f} -> {remedy.report.memory.peak / 1e9:.2f} GB"
        seconds = "" if remedy.cost is None else f", about {significant(remedy.cost)} s a step"
        yield f"  {shown(remedy.changes)}: {peaks}{seconds}"
