"""docs/configuration.md agrees with the definitions of the keys."""

from pathlib import Path

from glm_jax.config import default_values
from glm_jax.config.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_keys_say() -> None:
    found = "\n".join(reference()) + "\n"
    assert PAGE.read_text(encoding="utf-8") == found, "stale: glm-jax config keys > docs/configuration.md"


def test_every_key_has_a_line_with_words() -> None:
    lines = [line.split(" | ") for line in reference() if line.startswith("| `")]
    assert len(lines) == len(default_values({"sources": ["NAME"], "instructions": ["NAME"]}))
    assert all(line[-1].removesuffix(" |").strip() for line in lines)
