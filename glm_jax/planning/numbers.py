"""Numbers of plans as text."""


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, or all before the point if there are more.

    >>> significant(0.012345), significant(74.56), significant(1234.5)
    ('0.0123', '74.6', '1,234')
    """
    return f"{value:,.0f}" if value >= 10**digits - 0.5 else f"{value:,.{digits}g}"
