"""Counts the products of a traced pass turn by turn, with the trip counts that its loops would have.

An independent reader of jaxprs: values that follow from the schedule and from a device's place are computed, those of
params and rows are not. So it finds how many turns each loop over blocks takes at each tick and on each stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

SMALL = 4096  # entries of the arrays whose values are followed
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def pass_flops(closed: Any, sizes: Mapping[str, int]) -> int:
    """Return the products' operations of all devices of the mesh; a multiply-add counts as 2."""
    stages = [{"data": 0, "pipeline": stage, "tensor": 0} for stage in range(sizes["pipeline"])]
    unknown = [None] * len(closed.jaxpr.invars)
    counts = [_Device(place)(closed.jaxpr, closed.consts, unknown)[0] for place in stages]
    return sum(counts) * sizes["data"] * sizes["tensor"]


class _Device:
    """The device at one place of the mesh."""

    def __init__(self, place: Mapping[str, int]) -> None:
        self.place = place

    def __call__(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> tuple[int, list[Any]]:
        """Return the operations of a jaxpr, and its outputs where they are known, else None."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= dict(zip(jaxpr.invars, values, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        total = 0
        for equation in jaxpr.eqns:
            count, outputs = self.equation(equation, [value(atom) for atom in equation.invars])
            total += count
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return total, [value(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Any]) -> tuple[int, list[Any]]:
        kind, params = equation.primitive.name, equation.params
        unknown = [None] * len(equation.outvars)
        if kind == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            return 2 * summed * math.prod(equation.outvars[0].aval.shape), unknown
        if kind == "while":
            return self.loop(params, inputs)
        if kind == "scan":
            return self.scan(equation, inputs)
        if kind == "axis_index":
            return 0, [np.int32(self.place[params["axis_name"]])]
        if kind in ("pvary", "pcast"):
            return 0, inputs
        called = next((params[name] for name in CALLS if name in params), None)
        if called is not None:
            consts = getattr(called, "consts", ())
            return self(getattr(called, "jaxpr", called), consts, inputs)
        return 0, computed(equation, inputs) or unknown

    def loop(self, params: Mapping[str, Any], inputs: list[Any]) -> tuple[int, list[Any]]:
        first, held = params["cond_nconsts"], params["body_nconsts"]
        of_condition, of_body, carry = inputs[:first], inputs[first : first + held], inputs[first + held :]
        condition, body, total = params["cond_jaxpr"], params["body_jaxpr"], 0
        while True:
            (goes_on,) = self(condition.jaxpr, condition.consts, [*of_condition, *carry])[1]
            assert goes_on is not None, "a loop whose turns depend on the data"
            if not goes_on:
                return total, carry
            count, carry = self(body.jaxpr, body.consts, [*of_body, *carry])
            total += count

    def scan(self, equation: Any, inputs: list[Any]) -> tuple[int, list[Any]]:
        closed, total = equation.params["jaxpr"], 0
        body = closed.jaxpr
        carried = sum(a.aval.shape == b.aval.shape for a, b in zip(equation.outvars, body.outvars, strict=True))
        sliced = sum(a.aval.shape != b.aval.shape for a, b in zip(equation.invars, body.invars, strict=True))
        start = len(inputs) - sliced
        held, carry, rows = inputs[: start - carried], inputs[start - carried : start], inputs[start:]
        for turn in range(equation.params["length"]):
            slices = [None if row is None else np.asarray(row)[turn] for row in rows]
            count, outputs = self(body, closed.consts, [*held, *carry, *slices])
            total, carry = total + count, outputs[:carried]
        return total, [*carry, *[None] * (len(equation.outvars) - carried)]


def computed(equation: Any, inputs: list[Any]) -> list[Any] | None:
    """Return the outputs of a small equation of whole numbers if all inputs are known."""
    outputs = [variable.aval for variable in equation.outvars]
    followed = all(out.size <= SMALL and whole(out.dtype) for out in outputs)
    if not followed or any(value is None for value in inputs):
        return None
    made = equation.primitive.bind(*map(jnp.asarray, inputs), **equation.params)
    return [np.asarray(out) for out in (made if equation.primitive.multiple_results else [made])]


def whole(dtype: Any) -> bool:
    """Whether an array is of whole numbers or of truth values."""
    return bool(jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_))
