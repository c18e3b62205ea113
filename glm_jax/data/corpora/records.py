"""What reading a file yields: records with their lines, and damage in their place."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from glm_jax.errors import UserError
from glm_jax.types import Json

# The package that a format needs beyond our own dependencies, and the extra in setup.cfg that installs it.
PACKAGES = {"zstd": ("zstandard", "corpora"), "parquet": ("pyarrow", "parquet")}


@dataclass(frozen=True)
class Damaged:
    """A record, or a whole file, that cannot be read.

    Attributes:
        reason: one of a few names, for counting.
        line: where the record starts or is broken, from 1. For parquet, the row.
        message: what is wrong and how to fix it, worded to follow "file, line n: ".
    """

    reason: str
    line: int
    message: str


Located = tuple[int, Json | list[Json]]  # line, or row, and the record


def import_package(form: str, module: str) -> ModuleType:
    """Import a module that reading `form`, a key of PACKAGES, needs.

    Raises UserError, which names the extra to install, if it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package, extra = PACKAGES[form]
        raise UserError(f"reading {form} needs the package {package}: pip install -e '.[{extra}]'") from None
