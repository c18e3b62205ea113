"""The lines of `glm-jax plan` about an estimate."""

from __future__ import annotations

from collections.abc import Iterator

from glm_jax.planning.estimate import Cost, Plan
from glm_jax.planning.layout import stages_line
from glm_jax.planning.numbers import significant
from glm_jax.planning.speed import Speed


def table(plan: Plan) -> Iterator[str]:
    """Yield the lines about an estimate; those on speed only for a device whose rates are known."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    yield f"estimate for {plan.devices:,} x {plan.device}, {mesh}, {plan.schedule}, stash {plan.stash}"
    parts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    yield f"parameters {plan.total_parameters:,}: {parts}"
    yield (f"a token takes {plan.flops.model / 1e9:,.4g} GFLOP, {plan.flops.hardware / 1e9:,.4g} with what is computed "
           "again")  # fmt: skip
    memory = plan.memory
    named = ("params", "moments", "weights", "gradients", "stash", "messages", "rows", "work")
    shares = ", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in named)
    yield f"memory {memory.total / 1e9:.2f} GB a device: {shares}"
    yield f"in the work: logits {memory.logits / 1e9:.3f}, attention scores {memory.attention / 1e9:.3f}"
    sent = ", ".join(f"{axes} {size / 1e9:.3f}" for axes, size in plan.sent.items()) or "nothing"
    yield f"a device sends in a step, GB by axis: {sent}"
    yield f"idle {plan.bubble:.1%} of a stage's time ({plan.schedule}); {stages_line(plan.layers)}"
    yield f"checkpoint {plan.checkpoint.bytes / 1e9:,.2f} GB"
    yield f"run: {plan.steps:,} steps, {plan.tokens:,} row tokens"
    if not plan.known_rates:
        yield "speed: name a device with --target, such as a100-40gb"
        return
    yield f"if nothing overlaps: {_speed(plan.slowest)}; {_cost(plan.slowest_run)}"
    yield f"if everything does:  {_speed(plan.fastest)}; {_cost(plan.fastest_run)}"


def _speed(speed: Speed) -> str:
    return (
        f"{significant(speed.step_seconds, 4)} s a step, {speed.tokens_per_second:,.0f} tokens/s, MFU {speed.mfu:.1%}, "
        f"HFU {speed.hfu:.1%}"
    )


def _cost(cost: Cost) -> str:
    if cost.kilowatt_hours is None or cost.carbon_kilograms is None:
        return f"{significant(cost.days)} days"
    energy, carbon = significant(cost.kilowatt_hours / 1e3, 4), significant(cost.carbon_kilograms / 1e3, 4)
    return f"{significant(cost.days)} days, {energy} MWh, {carbon} t of CO2"
