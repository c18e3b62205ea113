"""Names for values that have no narrower type, so that signatures say what an `Any` is."""

from __future__ import annotations

from typing import Any

Tree = Any  # a pytree of arrays, or of what stands for them: shapes, specs, shardings. jax gives pytrees no type
Json = dict[str, Any]  # one JSON object: an event, a record, an index. The types of its values differ by key
