"""The syntax of prompts, as AUTOMATIC1111's web UI reads it: weights in brackets, escapes, and BREAK.

    (word)      1.1 times the attention, ((word)) 1.21 times
    [word]      1 / 1.1 times
    (word:1.3)  1.3 times; weights of nested brackets multiply
    \\(          a bracket that is text
    BREAK       continues in the next piece of 75 tokens

A bracket that is never closed reaches to the end, and one that was never opened is text. A single backslash is left out.
Its other syntax would change the prompt between steps or load further models: `check` refuses it.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

STRONGER = 1.1
"""What a pair of round brackets multiplies a weight by; square brackets divide by it."""

MOST_WEIGHT = 10.0
"""Results fall apart far below. Without a limit, hundreds of brackets would multiply to infinity."""

MOST_BREAKS = 15
"""Each starts a piece, and memory and time grow with the number of pieces."""

_MARKS = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\]?)
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)
    | (?P<close>[)\]])
    | [^\\()\[\]:]+
    | :
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_LATER = re.compile(r":\s*([+-]?[.\d]+)\s*$")
_NUMBER = re.compile(r":\s*([+-]?(?:\d*\.){2}[.\d]*)\s*\)")


class Span(NamedTuple):
    """Text and the weight that multiplies its embedding."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Span]]:
    """The spans of each section of a prompt; BREAK separates sections. Accepts any text."""
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket begins

    def add(*found: str | None) -> None:
        texts.extend(found)
        weights.extend([1.0] * len(found))

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for mark in _MARKS.finditer(prompt):
        found = mark[0]
        if mark["open"]:
            opened[found].append(len(texts))
        elif mark["weight"] and opened["("]:
            close("(", float(mark["weight"]))
        elif found == ")" and opened["("]:
            close("(", STRONGER)
        elif found == "]" and opened["["]:
            close("[", 1 / STRONGER)
        elif mark["escaped"] is not None:
            add(mark["escaped"])
        else:
            first, *others = _BREAK.split(found)
            add(first.rstrip() if others else first)
            for number, text in enumerate(others, 1):
                add(None, text.strip() if number < len(others) else text.lstrip())
    for bracket, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        while opened[bracket]:
            close(bracket, factor)
    return _sections(texts, weights)


def check(prompt: str) -> None:
    """Raise ValueError, with a sentence that says what to write instead, for what is not supported."""
    if network := _NETWORK.search(prompt):
        if network[1] not in ("lora", "lyco"):
            raise ValueError(f"{network[0]} would load another model, which is not supported")
        raise ValueError(f"{network[0]} must be given as an option, loras={':'.join(network[2].split(':')[:2])}")
    if re.search(r"\bAND\b", prompt):
        raise ValueError("several prompts joined by AND are not supported; write the word in lowercase")
    _check_square_brackets(prompt)
    if number := _NUMBER.search(prompt):
        raise ValueError(f"{number[1]} is not a number, in {number[0]}")
    sections = parse(prompt)
    if len(sections) > MOST_BREAKS + 1:
        raise ValueError(f"a prompt may have at most {MOST_BREAKS} BREAKs, not {len(sections) - 1}")
    for span in (span for section in sections for span in section):
        if not abs(span.weight) <= MOST_WEIGHT:  # which NaN isn't either
            raise ValueError(f"weights must be from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}, but {span.text!r} has {span.weight:g}")


def _sections(texts: list[str | None], weights: list[float]) -> list[list[Span]]:
    """Spans between BREAKs, with neighbours of the same weight merged and empty ones left out."""
    sections: list[list[Span]] = [[]]
    for (is_break, weight), run in groupby(zip(texts, weights, strict=True), key=lambda pair: (pair[0] is None, pair[1])):
        if is_break:
            sections += [[] for _ in run]
        elif text := "".join(text or "" for text, _ in run):
            sections[-1].append(Span(text, weight))
    return sections


def _check_square_brackets(prompt: str) -> None:
    """Raise ValueError for [a|b] and [a:b:0.5], which change the prompt between steps."""
    opened: list[int] = []  # where each open bracket is
    unsupported = "would change the prompt between steps, which is not supported"
    for mark in _MARKS.finditer(prompt):
        inside = bool(opened) and prompt[opened[-1]] == "["
        if mark["open"]:
            opened.append(mark.start())
        elif inside and "|" in mark[0]:
            raise ValueError(f"[a|b] {unsupported}; write \\[ for a bracket that is text")
        elif inside and mark[0] == "]" and (number := _LATER.search(prompt, opened[-1], mark.start())):
            hint = f"write (word:{number[1]}) for a weight, and \\[ for a bracket that is text"
            raise ValueError(f"{prompt[opened[-1] : mark.end()]} {unsupported}; {hint}")
        elif (mark["close"] or mark["weight"]) and opened:
            opened.pop()
