"""Messages for people: one line, and nothing that steers a terminal."""

import pickle

import pytest

from glm_jax.errors import UserError, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\n\tb 中文 é", "a\n\tb 中文 é"),
        ("\x1b[31m\x07\r\x00", r"\x1b[31m\x07\r\x00"),
        ("\x7f\x9b2J\x85", r"\x7f\x9b2J\x85"),
        (r"a\b", r"a\b"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text, keep="\n\t") == shown


@pytest.mark.parametrize(
    "quoted, shown", [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("a\u2028b", r"a\u2028b"), ("中文", "中文")]
)
def test_a_message_that_quotes_a_file_is_one_line(quoted: str, shown: str):
    error = UserError(f"tensor {quoted} is missing")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == f"tensor {shown} is missing"
    assert len(str(error).splitlines()) == 1
