"""Find where cosmic-ray can mutate the code, leave out what cannot change behaviour, and draw a sample."""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import hashlib
import importlib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Place = tuple[int, int]  # a line, from 1, and a column, from 0, in characters
Span = tuple[Place, Place]

ROOMS: dict[str, tuple[str, ...]] = {
    "rows": ("glm_jax/data/rows/*.py",),
    "inference": ("glm_jax/inference/*.py",),
    "model": ("glm_jax/model/*.py",),
    "training": ("glm_jax/engine/*.py", "glm_jax/training/*.py"),
    "parallel": ("glm_jax/parallel/*.py", "glm_jax/parallel/pipeline/*.py"),
}
FLOOR = 20  # each room has at least a share of 1 / FLOOR of the sample
SAYING = {"print", "say", "debug", "info", "warning", "error", "exception", "warn"}

ANNOTATION = "a type annotation or alias"
NAMES = "__all__ or TYPE_CHECKING"
WORDS = "the words of an error or a log"
NO_OPERATOR = "a star or slash that is no operator"
LITERAL = "`is` with a literal, which the compiler warns of"

# Leaves that no operator of cosmic-ray mutates; trying 200 operators on each would take most of the time.
INERT = {"name", "string", "newline", "endmarker", "fstring_start", "fstring_string", "fstring_end"}
PUNCTUATION = set("()[]{},.:=;")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change that one operator makes at one place."""

    room: str
    path: str
    operator: str
    occurrence: int  # among the operator's places in the module
    span: Span
    digest: str  # of the module's source
    place: str  # identifies the place by its line's text, so that edits elsewhere do not change it

    @property
    def key(self) -> str:
        return f"{self.path}:{self.operator}:{self.occurrence}:{self.digest}"

    @property
    def line(self) -> int:
        return self.span[0][0]


def modules(root: Path, room: str) -> list[str]:
    """Return the paths of a room's modules."""
    return sorted(path.relative_to(root).as_posix() for pattern in ROOMS[room] for path in root.glob(pattern))


def silent_spans(source: str) -> Iterator[tuple[Span, str]]:
    """Yield the spans of a module where a mutation cannot change what it does, each with the reason.

    Docstrings need none: cosmic-ray does not mutate strings.
    """
    span = _spans(source)
    tree = ast.parse(source)
    for node in tree.body:  # aliases of types, such as `History = Mapping[str, float] | ...`
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name == "__all__":
                yield span(node), NAMES
            elif re.match("[A-Z][a-z]", name):
                yield span(node), ANNOTATION
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield span(node), NAMES
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                yield span(annotation), ANNOTATION
        said = None
        if isinstance(node, ast.Raise):
            said = node.exc
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            said = node if name in SAYING else None
        if isinstance(said, ast.Call):
            for argument in (*said.args, *(keyword.value for keyword in said.keywords)):
                yield span(argument), WORDS


def _spans(source: str) -> Callable[[Any], Span]:
    """Return a function from a node of `ast` to its span: `ast` counts columns in bytes, cosmic-ray in characters."""
    lines = [line.encode() for line in source.split("\n")]

    def span(node: Any) -> Span:
        ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        (first, last) = ((line, len(lines[line - 1][:column].decode())) for line, column in ends)
        return first, last

    return span


def gaps(source: str) -> tuple[list[Span], list[Span]]:
    """Return the spans between operands: of binary operators, and of comparisons with a literal."""
    span = _spans(source)
    binary: list[Span] = []
    literal: list[Span] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            binary.append((span(node.left)[1], span(node.right)[0]))
        elif isinstance(node, ast.Compare):
            for left, right in itertools.pairwise((node.left, *node.comparators)):
                if any(_is_literal(side) for side in (left, right)):
                    literal.append((span(left)[1], span(right)[0]))
    return binary, literal


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_literal(node.operand)
    singleton = isinstance(node, ast.Constant) and (node.value is None or node.value in (True, False))
    return isinstance(node, ast.Constant | ast.Tuple | ast.JoinedStr) and not singleton


def _inside(span: Span, outer: Span) -> bool:
    return outer[0] <= span[0] and span[1] <= outer[1]


def find(root: Path, room: str, path: str) -> tuple[list[Mutant], collections.Counter[str]]:
    """Find a module's mutants, and count those that cannot change behaviour by reason."""
    plugins, trees = _cosmic_ray("plugins"), _cosmic_ray("ast")
    source = (root / path).read_text(encoding="utf-8")
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    nodes = [node for node in trees.ast_nodes(trees.get_ast(source))
             if node.type not in INERT and getattr(node, "value", None) not in PUNCTUATION]  # fmt: skip
    silent, (binary, literal) = list(silent_spans(source)), gaps(source)
    names = _place_names(path, source)
    found: list[Mutant] = []
    left_out: collections.Counter[str] = collections.Counter()
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments():  # those that need a list of variables
            continue
        operator = kind()
        spans = (span for node in nodes for span in operator.mutation_positions(node))
        for occurrence, span in enumerate(spans):
            reason = next((why for outer, why in silent if _inside(span, outer)), None)
            if "ReplaceBinaryOperator" in name and not any(_inside(span, gap) for gap in binary):
                reason = reason or NO_OPERATOR
            if re.search("_Is(Not)?$", name) and any(_inside(span, gap) for gap in literal):
                reason = reason or LITERAL
            if reason:
                left_out[reason] += 1
            else:
                found.append(Mutant(room, path, name, occurrence, span, digest, names(span)))
    return found, left_out


def _place_names(path: str, source: str) -> Callable[[Span], str]:
    lines = [line.strip() for line in source.split("\n")]
    seen: collections.Counter[str] = collections.Counter()
    ordinals = []
    for line in lines:
        ordinals.append(seen[line])
        seen[line] += 1

    def name(span: Span) -> str:
        (line, column), end = span
        indent = len(source.split("\n")[line - 1]) - len(source.split("\n")[line - 1].lstrip())
        size = (end[0] - line, end[1] - (column if end[0] == line else 0))
        return f"{path}|{lines[line - 1]}|{ordinals[line - 1]}|{column - indent}|{size}"

    return name


def _cosmic_ray(name: str) -> Any:
    return importlib.import_module(f"cosmic_ray.{name}")  # an extra, which the tests of this module do not need


def mutated(root: Path, mutant: Mutant) -> str | None:
    """Return the mutant's source, or None if it does not compile or means the same as before."""
    source = (root / mutant.path).read_text(encoding="utf-8")
    operator = _cosmic_ray("plugins").get_operator(mutant.operator)()
    text = _cosmic_ray("mutating").mutate_code(source, operator, mutant.occurrence)
    if text is None or text == source:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(text, mutant.path, "exec")
        except (SyntaxError, SyntaxWarning):
            return None
    return None if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)) else text


def changed_line(source: str, text: str) -> tuple[str, str]:
    """Return the first line that differs, before and after; after a removal it is empty."""
    before = after = ""
    for line in difflib.unified_diff(source.split("\n"), text.split("\n"), n=0, lineterm=""):
        if line.startswith("-") and not line.startswith("---"):
            before = before or line[1:].strip()
        elif line.startswith("+") and not line.startswith("+++"):
            after = after or line[1:].strip()
    return before, after


def shares(sizes: Mapping[str, int], sample: int) -> dict[str, int]:
    """Divide a sample among rooms by their sizes, each at least its floor; the shares sum to `sample` or more."""
    floor, total = math.ceil(sample / FLOOR), max(sum(sizes.values()), 1)
    return {room: min(size, max(floor, math.ceil(sample * size / total))) for room, size in sizes.items()}


def draw(mutants: Sequence[Mutant], sample: int, seed: int, usable: Callable[[Mutant], bool]) -> list[Mutant]:
    """Draw at least `sample` mutants: room by room in proportion to their mutants, no two at the same place.

    Places are taken in the order of a seeded digest, and one mutant of each place in the same way. A line of
    arithmetic, which eleven operators can change, thus has no more weight than a comparison. Edits do not change the
    order of other places.
    """
    rooms: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        rooms.setdefault(mutant.room, []).append(mutant)
    drawn: list[Mutant] = []
    for room, share in shares({room: len(those) for room, those in rooms.items()}, sample).items():
        places: dict[str, list[Mutant]] = {}
        for mutant in rooms[room]:
            places.setdefault(mutant.place, []).append(mutant)
        usables = (
            next(filter(usable, _shuffled(places[place], f"{seed}|{place}")), None)
            for place in _shuffled(places, str(seed), str)
        )
        drawn += itertools.islice(filter(None, usables), share)
    return drawn


def _shuffled(items: Iterable[Any], seed: str, name: Callable[[Any], str] | None = None) -> list[Any]:
    """Sort by a seeded digest of each item's name, or of its number where there is no name."""
    named = [(name(item) if name else str(number), item) for number, item in enumerate(items)]
    return [item for _, item in sorted(named, key=lambda pair: hashlib.sha256(f"{seed}|{pair[0]}".encode()).digest())]
