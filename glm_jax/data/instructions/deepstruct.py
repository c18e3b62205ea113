"""Functions that GLM-130B's templates for DeepStruct's data sets call (appendix C.2 of arXiv 2210.02414).

The paper prints the templates without these functions, so they follow its description of the tasks. A relation is a
mapping with `head`, `relation` and `tail`; head and tail are texts, or lists that begin with the text. `shuffle`, which
draws, is in sandbox.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

Entity = str | Sequence[str]
Relation = Mapping[str, Entity]


def format_triple(relations: Iterable[Relation], allowed: Collection[Entity] = ()) -> list[str]:
    """Return "( head ; relation ; tail )" for each relation whose name is allowed, in order.

    Args:
        relations: of a record.
        allowed: names; if empty, all are.
    """
    found = [one for one in relations if not allowed or one["relation"] in allowed]
    return [f"( {_text(one['head'])} ; {one['relation']} ; {_text(one['tail'])} )" for one in found]


def filter_relation(relations: Iterable[Relation], name: str) -> list[Relation]:
    """Return the relations of a name, in order."""
    return [one for one in relations if one["relation"] == name]


def filter_type(items: Iterable[tuple[Entity, str] | Relation], kind: str) -> list[str]:
    """Return the texts of the items of a kind, in order.

    Args:
        items: pairs of an entity and its type, or relations of arguments (their heads) to an event, whose names are the
            arguments' roles.
        kind: type or role.
    """
    pairs = [(one["head"], one["relation"]) if isinstance(one, Mapping) else one for one in items]
    return [_text(entity) for entity, label in pairs if label == kind]


def _text(entity: Entity) -> str:
    return entity if isinstance(entity, str) else entity[0]
