"""A reader of the pickles in torch files that runs nothing: a stack machine of our own over a list of opcodes.

Python's unpickler hands out live objects, which later opcodes may change, and works as long as a pickle makes it work.
Here a name that the pickle asks for becomes a `Name`, which can do nothing; the two calls and the one kind of reference
that a checkpoint of tensors needs are carried out by this file; and work, depth and sizes have limits.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_OPCODES = 1_000_000  # a tensor takes about 40
MAX_AXES = 32
Stack = list[Any]  # of dicts, lists, tuples, strings, numbers, Names, Storages and Tensors


class Forbidden(Exception):
    """The pickle asks for a name that no checkpoint of tensors needs."""


class Name(NamedTuple):
    """A global name in a pickle, "module.name"."""

    text: str


class Storage(NamedTuple):
    """The bytes that a tensor refers to."""

    kind: str  # the name of its storage type, such as torch.FloatStorage
    key: str


class Tensor(NamedTuple):
    """What a pickled tensor says of itself: a storage, and in elements, offset, shape and strides."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(index: bytes, allowed: frozenset[str]) -> object:
    """Read a pickle whose tensors are references into storages.

    Args:
        index: the pickle.
        allowed: the names of types that may stand in it, such as "torch.FloatStorage".

    Returns:
        Dicts, lists, tuples, strings, numbers, Names and Tensors. Parts that the pickle shares are shared.

    Raises:
        Forbidden: it asks for another name.
        pickle.UnpicklingError: it is no such pickle, or exceeds a limit.
    """
    machine = _Machine(allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a damaged string may hold an escape of no meaning
        for count, (opcode, argument, _) in enumerate(pickletools.genops(index)):
            if count == MAX_OPCODES:
                raise _bad(f"it has more than {MAX_OPCODES} instructions")
            if opcode.name != "STOP":
                machine.run(opcode.name, argument)
    return machine.stack.pop()


def _bad(reason: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(reason)


class _Machine:
    """The stack and the memo of a pickle; a method for each instruction that does more than push what it names."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed | {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict"}
        self.stack: Stack = []
        self.outer: list[Stack] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}

    def run(self, opcode: str, argument: Any) -> None:  # the types of arguments differ by opcode
        """Carry out one instruction."""
        if opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode]())
        elif opcode in PUSHED:
            self.stack.append(argument)
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif (action := getattr(self, f"_{opcode.lower()}", None)) is not None:
            action(argument)
        else:
            raise _bad(f"it has the instruction {opcode}, which no checkpoint of tensors needs")

    def _mark(self, _: object) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _marked(self) -> Stack:
        """Return what was pushed since the last mark, and forget the mark."""
        marked, self.stack = self.stack, self.outer.pop()
        return marked

    def _pop(self, _: object) -> None:
        self.stack.pop()

    def _pop_mark(self, _: object) -> None:
        self._marked()

    def _tuple(self, _: object) -> None:
        marked = tuple(self._marked())
        self.stack.append(marked)

    def _last(self, count: int) -> tuple[Any, ...]:  # parts of the stack
        if len(self.stack) < count:
            raise _bad("an instruction finds too little on the stack")
        last = tuple(self.stack[-count:])
        del self.stack[-count:]
        return last

    def _tuple1(self, _: object) -> None:
        self.stack.append(self._last(1))

    def _tuple2(self, _: object) -> None:
        self.stack.append(self._last(2))

    def _tuple3(self, _: object) -> None:
        self.stack.append(self._last(3))

    def _list(self, _: object) -> None:
        marked = self._marked()
        self.stack.append(marked)

    def _dict(self, _: object) -> None:
        marked = self._marked()
        self.stack.append({})
        self._set(marked)

    def _append(self, _: object) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: object) -> None:
        self._extend(self._marked())

    def _setitem(self, _: object) -> None:
        self._set(list(self._last(2)))

    def _setitems(self, _: object) -> None:
        self._set(self._marked())

    def _extend(self, values: Stack) -> None:
        if not isinstance(self.stack[-1], list):
            raise _bad("something is appended to what is not a list")
        self.stack[-1].extend(values)

    def _set(self, pairs: Stack) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise _bad("an item is set in what is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # the hash of a nested tuple can take for ever
            if not isinstance(key, str) and not (type(key) is int and 0 <= key < 2**31):
                raise _bad("a dict has a key that is neither text nor a small number")
            table[key] = value

    def _global(self, argument: str) -> None:
        self._push_name(".".join(argument.split(" ")))

    def _stack_global(self, _: object) -> None:
        self._push_name(".".join(self._last(2)))

    def _push_name(self, text: str) -> None:
        if text not in self.allowed:
            raise Forbidden(text)
        self.stack.append(Name(text))

    def _reduce(self, _: object) -> None:
        name, arguments = self._last(2)
        if name == Name("collections.OrderedDict") and arguments == ():
            self.stack.append({})
        elif name == Name("torch._utils._rebuild_tensor_v2"):
            self.stack.append(_tensor(*arguments))
        else:
            raise _bad("it makes a call that no checkpoint of tensors needs")

    def _build(self, _: object) -> None:
        """Leave out the attributes of an OrderedDict: torch notes versions of modules there."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _bad("it sets attributes of what is not a dict")

    def _binpersid(self, _: object) -> None:
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise _bad("it refers to something other than a storage")
        _, kind, key, _, _ = reference
        if not isinstance(kind, Name) or not isinstance(key, str):
            raise _bad("it refers to a storage without a type or a key")
        self.stack.append(Storage(kind.text, key))


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> Tensor:
    (first,), sizes, steps = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if not isinstance(storage, Storage):
        raise _bad("a tensor refers to something other than a storage")
    if len(sizes) != len(steps):
        raise _bad("a tensor has more or fewer sizes than strides")
    return Tensor(storage, first, sizes, steps)


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_AXES:
        raise _bad(f"a tensor is described by something other than up to {MAX_AXES} sizes")
    if any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise _bad("a tensor is described by something other than sizes")
    return values


CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
PUSHED = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
])  # fmt: skip
