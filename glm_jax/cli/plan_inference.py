"""`glm-jax plan --inference`: what generation takes, and which mesh and weights fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli import plan as plan_command
from glm_jax.cli.common import say
from glm_jax.errors import UserError
from glm_jax.planning import choices, estimate, generation, worker
from glm_jax.planning.choices import Choice
from glm_jax.planning.compile import Report, Request, Verdict, verdict
from glm_jax.planning.generation import Memory, Plan, Rate
from glm_jax.planning.numbers import significant
from glm_jax.planning.programs import Inference, pieces

if TYPE_CHECKING:
    from glm_jax.cli.plan_page import Draw
    from glm_jax.planning.targets import Target

ANY = "any"  # of --inference: whatever weights fit
Compiled = list[tuple[Report, Verdict | None]]


def run(
    values: flags.FlagValues, request: Request, target: Target, memory: int | None, processes: int, draw: Draw
) -> int:
    """Estimate generation, compile it unless --nocompile, and show both."""
    experiment = request.experiment
    kind = "float16" if values.inference == ANY else values.inference  # of any, each has its turn
    inference = Inference(kind, values.room or experiment.data.seq_length, values.rows, values.group)
    if values.inference == ANY:
        return _any(values, request, target, memory, inference, processes)
    count = request.devices()
    device = target.device or estimate.processor(*request.sheets)
    plan = generation.plan(experiment, inference, device, pieces(experiment))
    if not values.json:
        print("\n".join(table(plan, target.name, memory)), flush=True)
    compiled: Compiled = []
    if values.compile:
        say(f"compiling for {count:,} x {target.name}, none of which is used; large models take a minute or two")
        compiled = _compiled(request, inference, memory, processes)
    _print(values, {"estimate": plan.to_json()}, compiled)
    draw(None, compiled)
    return 0


def _any(
    values: flags.FlagValues, request: Request, target: Target, memory: int | None, inference: Inference, processes: int
) -> int:
    """Print what there is to choose from, and compile the smallest that fits."""
    if memory is None:
        raise UserError("--inference any asks what fits: give --memory, such as 24GB, or a --target")
    device = target.device or estimate.processor(*request.sheets)
    counts = (target.slice_devices,) if target.slice_devices else choices.COUNTS
    found = list[Choice]()
    if not values.json:
        print("\n".join(heading(inference, target.name, memory)), flush=True)
    for one in choices.choices(request.experiment, inference, device, pieces(request.experiment), memory, counts):
        found.append(one)
        if not values.json:
            print(line(one), flush=True)
    offered = choices.best(found)
    if not values.json:
        print("\n".join(summary(offered, counts)), flush=True)
    compiled: Compiled = []
    for one in offered if values.compile else ():
        say(f"compiling {name(one)} for {target.name}, none of which is used; large models take a minute or two")
        changed = dataclasses.replace(request, experiment=one.experiment)
        compiled += (reports := _compiled(changed, one.inference, memory, processes))
        if all(judged and judged.fits for _, judged in reports):
            break
        say("it does not fit as compiled")
    rows = [{"mesh": one.experiment.mesh.sizes(), "inference": dataclasses.asdict(one.inference),
             "weights": one.weights, "cache": one.cache, "fits": one.fits, "best": one in offered,
             "estimate": one.plan.to_json() if one.plan else None} for one in found]  # fmt: skip
    _print(values, {"choices": rows}, compiled)
    return 0


def _compiled(request: Request, inference: Inference, memory: int | None, processes: int) -> Compiled:
    """Compile prefill and decoding."""
    programs = [dataclasses.replace(request, program=program, inference=inference) for program in ("prefill", "decode")]
    return [(report, verdict(report, memory) if memory else None) for report in worker.reports(programs, processes)]


def _print(values: flags.FlagValues, estimated: Mapping[str, object], compiled: Compiled) -> None:
    if values.json:
        shown = {"compiled": [plan_command.row(*pair) for pair in compiled], "remedies": []} if values.compile else {}
        print(json.dumps({**estimated, **shown}))
        return
    for pair in compiled:
        print("\n".join(plan_command.table(*pair)))


def table(plan: Plan, target: str, memory: int | None) -> Iterator[str]:
    """Yield the lines about an estimate of one mesh."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    inference = plan.inference
    yield (f"estimate of generation on {plan.devices:,} x {target}, {mesh}, weights {inference.weights}, "
           f"{plan.rows:,} {'row' if plan.rows == 1 else 'rows'} of {inference.room:,} tokens")  # fmt: skip
    yield f"memory {plan.memory.total / 1e9:.2f} GB a device: {parts(plan.memory)}"
    if memory is not None:
        yield plan_command.fit(plan.memory.total, memory)
    if plan.slowest is None or plan.fastest is None:
        yield "speed: name a device with --target, such as a100-40gb"
        return
    yield f"if nothing overlaps: {rate(plan.slowest)}"
    yield f"if everything does:  {rate(plan.fastest)}"


def parts(memory: Memory) -> str:
    """Return the parts of a memory in GB."""
    return ", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in ("weights", "cache", "work"))


def rate(rate: Rate) -> str:
    """Return a rate as text."""
    return (f"contexts in {significant(rate.context_seconds)} s, then {significant(rate.tokens_per_second)} tokens/s, "
            f"{significant(rate.tokens_per_row)} of each row")  # fmt: skip


def heading(inference: Inference, target: str, memory: int) -> Iterator[str]:
    """Yield the lines above the choices."""
    yield (f"estimate of generation on {target}, {memory / 1e9:.2f} GB a device; rows of {inference.room:,} tokens, "
           f"{inference.rows:,} for each stage; GB a device")  # fmt: skip
    yield (f"{'weights':8} {'devices':>7} {'pipeline':>8} {'tensor':>6} {'weights':>8} {'cache':>7} {'total':>8} "
           f"{'fits':>4}  tokens/s in turn, overlapped")  # fmt: skip


def line(choice: Choice) -> str:
    """Return the line of a choice."""
    mesh, plan = choice.experiment.mesh, choice.plan
    total, fits, speed = f"{'more':>8}", "yes" if choice.fits else "no", ""
    if plan:
        total = f"{plan.memory.total / 1e9:8.2f}"
    if plan and plan.slowest and plan.fastest and choice.fits:
        speed = f"  {plan.slowest.tokens_per_second:7,.1f} {plan.fastest.tokens_per_second:9,.1f}"
    return (f"{choice.inference.weights:8} {choice.devices:7} {mesh.pipeline:8} {mesh.tensor:6} "
            f"{choice.weights / 1e9:8.2f} {choice.cache / 1e9:7.2f} {total} {fits:>4}{speed}")  # fmt: skip


def summary(offered: Sequence[Choice], counts: Sequence[int]) -> Iterator[str]:
    """Yield what is the best choice for each kind of weights."""
    if not offered:
        yield f"nothing fits on {max(counts)} devices or fewer: smaller --rows and --room or more --memory would help"
        return
    yield "the fewest devices for each kind of weights, on their fastest mesh:"
    for one in offered:
        yield f"  {name(one)}"


def name(choice: Choice) -> str:
    """Return a choice as words and the flags that ask for it."""
    sizes = " ".join(f"--config.mesh.{axis}={size}" for axis, size in choice.experiment.mesh.sizes().items())
    count = "1 device" if choice.devices == 1 else f"{choice.devices} devices"
    return f"{choice.inference.weights} on {count}: --inference {choice.inference.weights} {sizes}"
