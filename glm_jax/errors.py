"""Exceptions whose messages are for people: a user's mistake, and work that failed."""

import unicodedata


def printable(text: str, keep: str = "") -> str:
    """Return text for a terminal: control characters and ends of lines are escaped, as in \\x1b, but those to keep."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Zl", "Zp") and character not in keep
        else character
        for character in text
    )


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it.

    The command line prints the message after ``error: `` and exits with code 2, without a traceback. A message may
    quote a file or a flag as it is: what would break the line or steer a terminal is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class WorkFailed(Exception):
    """The work itself failed and said why in one line, as a run whose loss is no longer finite; exit code 4."""
