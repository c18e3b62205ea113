"""A traced program as kernels: what takes memory, what is computed, moved and sent, without compiling.

XLA decides when it compiles what becomes a kernel and what takes memory. What it does is close to a few rules:

- Elementwise work with one reader is computed where it is read, in one kernel with it. With several it takes memory.
- Products, reductions, collectives and loops read and write memory. What they read must lie there, except that a
  reduction computes its input on the way; on CPUs it does not.
- Slices of what a loop was given are taken when a turn begins, and updates are made in place, as soon as they can be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

LOOPS = {"while", "scan"}
VIEWS = {"reshape", "squeeze", "expand_dims", "pcast", "pvary", "name", "random_wrap", "random_unwrap", "stop_gradient",
         "optimization_barrier"}  # fmt: skip
SLICES = {"slice", "dynamic_slice", "gather"}  # read no more than they return
UPDATES = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}  # write no more than the update
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"}
ALL_REDUCES = {"psum", "psum2", "psum_invariant", "pmax", "pmin"}
GATHERS = {"all_gather", "all_gather_invariant", "all_to_all"}
SCATTERS = {"reduce_scatter", "psum_scatter"}
HEAVY = {*LOOPS, *UPDATES, *REDUCTIONS, *ALL_REDUCES, *GATHERS, *SCATTERS, "ppermute", "cond", "dot_general", "sort",
         "cumsum", "cummax", "random_bits", "pallas_call", "dot_product_attention_fwd_wrapper",
         "dot_product_attention_bwd_wrapper"}  # fmt: skip
COMPUTED = {"add", "add_any", "sub", "mul", "div", "max", "min", "select_n", "exp", "log", "tanh", "erf", "erfc",
            "sqrt", "rsqrt", "pow", "cos", "sin", "logistic", "slice", "broadcast_in_dim"}  # fmt: skip
EARLY = {"dynamic_slice", "slice", "broadcast_in_dim"}
SCALAR = 64  # bytes, at most, of indices and conditions, whose order does not matter
RANDOM = 6  # arrays as large as the bits: threefry's counters and results, and copies of some


class Value:
    """The result of an operation, or an input; equal only to itself."""

    def __init__(self, variable: Any = None) -> None:
        """Take the size of a jaxpr's variable."""
        aval: Any = getattr(variable, "aval", None)
        self.size = 0  # bytes
        if hasattr(aval, "shape"):
            key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
            self.size = math.prod(aval.shape) * (8 if key else aval.dtype.itemsize)


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation. Calls of functions are written out in place of the call."""

    kind: str
    inputs: list[Value]  # without constants
    outputs: list[Value]
    flops: int = 0  # of a product
    sent: Mapping[str, int] = dataclasses.field(default_factory=dict)  # bytes that a device sends, by mesh axes
    computes_input: bool = False  # on the way, instead of reading it from memory
    scratch: int = 0  # bytes while it runs
    bodies: tuple[Program, ...] = ()  # of a loop, or of a conditional's branches
    constants: int = 0  # how many inputs of a loop are the same in every turn
    carried: int = 0  # how many of the next ones go from turn to turn
    turns: int | None = None  # of a loop that says how many


class Program(NamedTuple):
    """Operations in their order."""

    inputs: list[Value]
    outputs: list[Value]
    operations: list[Operation]
    cpu: bool = True  # see Target


class Target(NamedTuple):
    """What the reading of a program depends on besides its equations."""

    sizes: Mapping[str, int]  # of the mesh's axes
    cpu: bool  # XLA's backend for CPUs keeps more in memory: inputs of reductions, arrays of random numbers, and
    # float32 copies of what it multiplies in half precision


def read(jaxpr: Any, target: Target) -> Program:
    """Turn a jaxpr into a program; inside a shard_map its bytes and operations are those of one device.

    Args:
        jaxpr: open, such as the body of a shard_map.
        target: where it would run.
    """
    known = {variable: Value(variable) for variable in (*jaxpr.constvars, *jaxpr.invars)}
    inputs = [known[variable] for variable in jaxpr.invars]
    operations: list[Operation] = []
    outputs = _inline(jaxpr, known, target, operations)
    return Program(inputs, outputs, _used(operations, outputs), target.cpu)


def _used(operations: list[Operation], outputs: list[Value]) -> list[Operation]:
    """Return the operations whose results are used, as compilers do: not the end of a block that is computed again."""
    used, found = set(outputs), list[Operation]()
    for one in reversed(operations):
        if not used.isdisjoint(one.outputs):
            used.update(one.inputs)
            found.append(one)
    return found[::-1]


def _inline(jaxpr: Any, known: dict[Any, Value], target: Target, operations: list[Operation]) -> list[Value]:
    """Append the operations of a jaxpr whose inputs are `known`, and return its outputs."""

    def value(atom: Any) -> Value:
        return Value() if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        called = _called(equation, target)
        if called is None:
            outputs = [Value(variable) for variable in equation.outvars]
            operations += _operations(equation, inputs, outputs, target)
        else:
            inner = {variable: Value(variable) for variable in called.constvars}
            inner |= dict(zip(called.invars, inputs[len(inputs) - len(called.invars) :], strict=True))
            outputs = _inline(called, inner, target, operations)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _called(equation: Any, target: Target) -> Any:
    """Return the jaxpr of a call that is no loop, or None. Of what depends on the platform, it is the target's."""
    if platforms := equation.params.get("branches_platforms"):
        wanted = (index for index, names in enumerate(platforms) if names is None or ("cpu" in names) == target.cpu)
        return equation.params["branches"][next(wanted)].jaxpr
    if equation.primitive.name in (*LOOPS, "cond", "pallas_call"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = equation.params.get(name)
        if found is not None:
            return getattr(found, "jaxpr", found)
    return None


def _operations(equation: Any, inputs: list[Value], outputs: list[Value], target: Target) -> list[Operation]:
    """Return the operations of an equation that calls nothing."""
    kind, params = equation.primitive.name, equation.params
    one = Operation(kind, inputs, outputs, computes_input=kind in REDUCTIONS and not target.cpu)
    if kind in ("slice", "dynamic_slice") and outputs[0].size == inputs[0].size:
        one.kind, one.inputs = "reshape", inputs[:1]  # as of a stage's only layer
    elif kind == "while":
        one.bodies, one.constants = (read(params["body_jaxpr"].jaxpr, target),), params["body_nconsts"]
        one.inputs = inputs[params["cond_nconsts"] :]
        one.carried = len(one.inputs) - one.constants
    elif kind == "scan":
        return _scan(equation, one, target)
    elif kind == "cond":
        one.bodies = tuple(read(branch.jaxpr, target) for branch in params["branches"])
        one.constants = len(inputs)
    elif kind == "dot_general":
        one.flops = product_flops(equation)
        if target.cpu:
            one.scratch = sum(_widened(variable) for variable in (*equation.invars, *equation.outvars))
    elif kind == "random_bits":
        one.scratch = RANDOM * outputs[0].size if target.cpu else 0
    else:
        one.sent = _sent(equation, inputs, outputs, target.sizes)
    return [one]


def _scan(equation: Any, one: Operation, target: Target) -> list[Operation]:
    """Complete a scan, and put the zeros before it that its stacked outputs begin as."""
    body = equation.params["jaxpr"].jaxpr
    # Read off the shapes: the names of the counts differ between versions of jax.
    one.carried = sum(map(_same_shape, equation.outvars, body.outvars))
    sliced = sum(not _same_shape(*pair) for pair in zip(equation.invars, body.invars, strict=True))
    one.constants = len(one.inputs) - one.carried - sliced
    one.bodies, one.turns = (read(body, target),), equation.params["length"]
    zeros = [Value(variable) for variable in equation.outvars[one.carried :]]
    one.inputs = [*one.inputs, *zeros]
    return [*(Operation("broadcast_in_dim", [], [zero]) for zero in zeros), one]


def _widened(variable: Any) -> int:
    """Return the bytes of a float32 copy of an array of half precision, 0 for others."""
    half = variable.aval.dtype.itemsize == 2
    return 4 * variable.aval.size if half else 0


def _same_shape(one: Any, other: Any) -> bool:
    return one.aval.shape == other.aval.shape


def product_flops(equation: Any) -> int:
    """Return the floating-point operations of a dot_general; a multiply-add counts as 2."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(left[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)


def _sent(equation: Any, inputs: list[Value], outputs: list[Value], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that each member of a collective sends, around a ring (arXiv 1909.08053 has the same)."""
    kind = equation.primitive.name
    if kind not in {*ALL_REDUCES, *GATHERS, *SCATTERS, "ppermute"}:
        return {}
    named = equation.params.get("axes", equation.params.get("axis_name"))
    named = (named,) if isinstance(named, str) else tuple(named)
    axes = [axis for axis in sizes if axis in named and sizes[axis] > 1]
    members = math.prod(sizes[axis] for axis in axes)
    given, got = (sum(value.size for value in values) for values in (inputs, outputs))
    if kind in GATHERS:
        count = given * (members - 1)
    elif kind in SCATTERS:
        count = got * (members - 1)
    elif kind == "ppermute":
        count = given
    else:
        count = 2 * given * (members - 1) // members
    return {"+".join(axes): count} if axes else {}


Reads = dict[Value, int]  # the buffers that a value is computed from, and the bytes read of each


class Kernel(NamedTuple):
    """An operation that writes memory, with the elementwise work that it does on the way."""

    operation: Operation
    reads: Reads
    writes: list[Value]

    @property
    def moved(self) -> int:
        """The bytes read and written."""
        if self.operation.kind in UPDATES:
            return 2 * self.operation.inputs[-1].size + sum(self.reads.values())
        return sum(self.reads.values()) + sum(value.size for value in self.writes)


def kernels(program: Program, *, repeats: bool = False) -> tuple[list[Kernel], dict[Value, Reads]]:
    """Return the kernels of a program in order, and what each of its outputs is computed from.

    Args:
        program: what runs.
        repeats: whether elementwise work is done again for each of its readers, instead of taking memory. XLA does so
            for accelerators where it is cheaper, which is where memory is the most.
    """
    demanded = _demanded(program, repeats)
    reads: dict[Value, Reads] = {value: {value: value.size} for value in program.inputs}
    found: list[Kernel] = []
    for one in program.operations:
        of_inputs = [reads.setdefault(value, {value: value.size}) for value in one.inputs]
        if one.kind in VIEWS:
            reads |= dict(zip(one.outputs, of_inputs, strict=False))
            continue
        merged = {base: count for part in of_inputs for base, count in part.items()}
        if one.kind in SLICES:
            merged = {base: min(count, one.outputs[0].size) for base, count in merged.items()}
        elif one.kind in UPDATES:
            merged |= dict.fromkeys(of_inputs[0], 0)
        if one.kind in HEAVY or not demanded.isdisjoint(one.outputs):
            found.append(Kernel(one, merged, [value for value in one.outputs if value.size]))
            reads |= {value: {value: value.size} for value in one.outputs}
        else:
            reads |= {value: merged for value in one.outputs}
    of_outputs = {value: reads.setdefault(value, {value: value.size}) for value in program.outputs}
    return _in_order(found, set(program.inputs)), of_outputs


def _demanded(program: Program, repeats: bool) -> set[Value]:
    """Return the values that must lie in memory, for those who read them."""
    demanded = set(program.outputs)
    updated = {one.inputs[0] for one in program.operations if one.kind in UPDATES}
    readers: dict[Value, int] = {}
    for one in reversed(program.operations):
        if one.kind in VIEWS:
            for output, value in zip(one.outputs, one.inputs, strict=False):
                readers[value] = readers.get(value, 0) + readers.get(output, 0)
                if output in demanded or one.kind == "optimization_barrier":
                    demanded.add(value)
            continue
        taken_before = one.kind in SLICES and one.inputs[0] in updated
        if taken_before or (not repeats and one.kind in COMPUTED and readers.get(one.outputs[0], 0) > 1):
            demanded.update(one.outputs)
        for value in set(one.inputs):
            readers[value] = readers.get(value, 0) + 1
        if one.kind in HEAVY and not one.computes_input:
            demanded.update(one.inputs[:1] if one.kind in UPDATES else one.inputs)
    return demanded


def _in_order(found: list[Kernel], given: set[Value]) -> list[Kernel]:
    """Return the kernels in the order in which they run: slices of what is given first, updates as soon as possible."""
    known = set(given)

    def ready(one: Kernel) -> bool:
        return all(value in known for value in one.reads if value.size > SCALAR)

    first = [one for one in found if one.operation.kind in EARLY and ready(one)]
    rest = [one for one in found if one not in first]
    waiting = [one for one in rest if one.operation.kind in UPDATES]
    ordered: list[Kernel] = []
    for one in [*first, *rest]:
        if one.operation.kind in UPDATES and one not in waiting:
            continue  # it has run
        ordered.append(one)
        known.update(one.writes)
        able = [update for update in waiting if update is not one and ready(update)]
        for update in able:
            ordered.append(update)
            known.update(update.writes)
        waiting = [update for update in waiting if update is not one and update not in able]
    return ordered
