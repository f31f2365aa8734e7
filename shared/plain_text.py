"""Untrusted text, made harmless for a terminal, a text log or a spreadsheet. JSON keeps it as it is."""

from __future__ import annotations

import unicodedata

STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that move the cursor, turn the direction of text, end a line, or are not text."""
FORMULA = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH COMMERCIAL AT}")


def harmless(text: str) -> str:
    """The text in one line, with characters that could steer a terminal or hide others replaced."""
    if text.isprintable():  # true for nearly all; category by category takes fifty times as long
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in STEERING else c for c in text)


def cell(text: str) -> str:
    """The text for a CSV file: spreadsheets show a cell with a leading apostrophe instead of computing it."""
    text = harmless(text)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def shortened(text: str, most: int) -> str:
    """The text, without its middle if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[most // 2 + 1 - most :]}"
