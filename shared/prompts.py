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
_NETWORK = re.compile(r"<\s*(\w+)\s*:([^<>]+)>")
_EMBEDDING = re.compile(
    r"(?<![\w-])(embedding:\s*[\w.-]+|(easy|fast|ng_?deep|verybadimage)negative[\w.-]*|negativexl\w*|bad-?hands?-?v?\d"
    r"|bad_prompt\w*|bad-(artist|image|picture)[\w-]*)",
    re.IGNORECASE,
)
"""ComfyUI's syntax, and well-known names: A1111 takes any name of an embedding for one, and has no mark for them."""
_WILDCARD = re.compile(r"__[\w/*.-]+?__|\{[^{}]*\|[^{}]*\}")
_PARAMETERS = re.compile(r"\bNegative prompt:|\bSteps: \d+, Sampler:")
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
    _check_networks(prompt)
    if embedding := _EMBEDDING.search(prompt):
        raise ValueError(f"{embedding[0]!r} is an embedding (textual inversion), which is not supported; leave it out")
    if wildcard := _WILDCARD.search(prompt):
        raise ValueError(f"{wildcard[0]} would be replaced at random, which is not supported; write the words themselves")
    if parameters := _PARAMETERS.search(prompt):
        raise ValueError(f"{parameters[0]!r} and what follows is not part of the prompt; give it as options of its own")
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


def _check_networks(prompt: str) -> None:
    """Raise ValueError for <lora:name:0.8> and its like."""
    networks = list(_NETWORK.finditer(prompt))
    for network in networks:
        if network[1].lower() not in ("lora", "lyco"):
            raise ValueError(f"{network[0]} would load another model, which is not supported; leave it out")
    if networks:
        loras = [":".join(part.strip() for part in network[2].split(":")[:2]) for network in networks]
        written = ", ".join(network[0] for network in networks)
        raise ValueError(f"{written} must be given as an option, loras={';'.join(loras)}")


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
