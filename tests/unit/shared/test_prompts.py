from __future__ import annotations

import re
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import InvalidOption
from imagemill.shared.prompts import MOST_BREAKS, Span, check, parse

PLAIN = st.text(st.characters(exclude_characters="()[]\\:"), min_size=1).filter(lambda text: "BREAK" not in text)
ANY = st.characters(codec="utf-8", exclude_characters="B")
WEIGHTS = st.floats(0.01, 10).map(lambda weight: float(f"{weight:.3f}"))


def spans(prompt: str) -> list[tuple[str, float]]:
    (section,) = parse(prompt)
    return [(text, round(weight, 4)) for text, weight in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red shoe", [("a red shoe", 1)]),
        ("", []),
        ("a (red) shoe", [("a ", 1), ("red", 1.1), (" shoe", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.9091)]),
        ("[[red]]", [("red", 0.8264)]),
        ("[(red)]", [("red", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:.5)(blue:2.)", [("red", 0.5), ("blue", 2)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:+1.5)", [("red", 1.5)]),
        ("(a (b:1.5) c:2)", [("a ", 2), ("b", 3), (" c", 2)]),
        ("a (((house:1.3)) [on] (hill:0.5)", [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" ", 1.1), ("hill", 0.55)]),
        ("(shoe)(box)", [("shoebox", 1.1)]),
        ("()", []),
        # what is escaped is text, and a single backslash is left out
        (r"\(red\)", [("(red)", 1)]),
        (r"\[red\]", [("[red]", 1)]),
        (r"(mona \(lisa\):1.2)", [("mona (lisa)", 1.2)]),
        (r"(red:1.3\)", [("red:1.3)", 1.1)]),
        (r"a \\ b \c", [(r"a \ b c", 1)]),
        # an open bracket reaches to the end, and one that was never opened is text
        ("a (red", [("a ", 1), ("red", 1.1)]),
        ("a [red", [("a ", 1), ("red", 0.9091)]),
        ("a red) shoe]", [("a red) shoe]", 1)]),
        ("red:1.3) shoe", [("red:1.3) shoe", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.9091)]),
        # a colon alone is text
        ("ratio 16:9, (shoe: red)", [("ratio 16:9, ", 1), ("shoe: red", 1.1)]),
        ("[red:blue]", [("red:blue", 0.9091)]),
        ("a | b", [("a | b", 1)]),
    ],
)  # fmt: skip
def test_weights_are_read_as_a1111_reads_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert spans(prompt) == expected
    check(prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a shoe BREAK a hat", [["a shoe"], ["a hat"]]),
        ("a shoe\nBREAK\na hat", [["a shoe"], ["a hat"]]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("BREAK a BREAK", [[], ["a"], []]),
        ("BREAKFAST break BREAKS", [["BREAKFAST break BREAKS"]]),
    ],
)
def test_break_separates_sections(prompt: str, expected: list[list[str]]) -> None:
    assert [[span.text for span in section] for section in parse(prompt)] == expected


def test_weights_reach_across_breaks() -> None:
    assert parse("(a BREAK b:1.3) c") == [[Span("a", 1.3)], [Span("b", 1.3), Span(" c", 1)]]


@given(PLAIN)
def test_plain_text_is_one_span_of_weight_one(text: str) -> None:
    assert parse(text) == [[Span(text, 1)]]


@given(PLAIN, st.lists(WEIGHTS, max_size=4))
def test_weights_of_nested_brackets_multiply(text: str, weights: list[float]) -> None:
    prompt, product = text, 1.0
    for weight in weights:
        prompt, product = f"({prompt}:{weight:.3f})", product * weight
    assert parse(prompt) == [[Span(text, product)]]


@given(
    st.lists(st.lists(st.tuples(st.text(ANY, min_size=1, max_size=5), WEIGHTS), min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_any_text_and_weights_can_be_written(sections: list[list[tuple[str, float]]]) -> None:
    written, expected = [], []
    for section in sections:
        written.append("".join(f"({escaped(text)}:{weight:.3f})" for text, weight in section))
        runs = groupby(section, key=lambda span: span[1])
        expected.append([Span("".join(text for text, _ in run), weight) for weight, run in runs])
    assert parse(" BREAK ".join(written)) == expected


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


@given(st.text("()[]\\:1.3 ab,|BREAK"))
def test_any_text_can_be_read(prompt: str) -> None:
    assert len(parse(prompt)) >= 1
    assert sum(len(span.text) for section in parse(prompt) for span in section) <= len(prompt)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a [cat|dog]", "between steps, which is not supported; write \\[ for a bracket that is text"),
        ("[(red:1.2)|blue] shoe", "[a|b] would change the prompt"),
        ("[cat:dog:0.5]", "[cat:dog:0.5] would change the prompt between steps"),
        ("[(cat):(dog):10]", "[(cat):(dog):10] would change the prompt"),
        ("a [fog::.8]", "[fog::.8] would change the prompt"),
        ("a [shoe:1.3]", "which is not supported; write (word:1.3) for a weight, and \\[ for a bracket that is text"),
        ("a cat AND a dog", "several prompts joined by AND are not supported; write the word in lowercase"),
        ("shoe <lora:flat:0.8>", "<lora:flat:0.8> must be given as an option, loras=flat:0.8"),
        ("shoe <lora:flat>", "<lora:flat> must be given as an option, loras=flat"),
        ("<lyco:flat:1:0.5>", "<lyco:flat:1:0.5> must be given as an option, loras=flat:1"),
        ("<LoRA: flat : 0.8 >", "<LoRA: flat : 0.8 > must be given as an option, loras=flat:0.8"),
        ("a <lora:flat:0.8> b <lora:ink>", "<lora:flat:0.8>, <lora:ink> must be given as an option, loras=flat:0.8;ink"),
        ("<hypernet:x:1>", "<hypernet:x:1> would load another model, which is not supported; leave it out"),
        ("<lora:flat:1> <embedding:x>", "<embedding:x> would load another model"),
        ("embedding:mine, shoe", "'embedding:mine' is an embedding (textual inversion), which is not supported; leave it out"),
        ("(embedding:my-style.v2:1.2)", "'embedding:my-style.v2' is an embedding"),
        ("blurry, EasyNegative", "'EasyNegative' is an embedding"),
        ("(bad-hands-5:1.3)", "'bad-hands-5' is an embedding"),
        ("bad_prompt_version2", "'bad_prompt_version2' is an embedding"),
        ("ng_deepnegative_v1_75t, badhandv4", "'ng_deepnegative_v1_75t' is an embedding"),
        ("a __colour__ shoe", "__colour__ would be replaced at random, which is not supported; write the words themselves"),
        ("__styles/*__", "__styles/*__ would be replaced"),
        ("a {red|blue} shoe", "{red|blue} would be replaced"),
        ("shoe\nNegative prompt: blurry", "'Negative prompt:' and what follows is not part of the prompt; give it as options"),
        ("shoe Steps: 20, Sampler: Euler a", "'Steps: 20, Sampler:' and what follows"),
        ("(shoe:11)", "weights must be from -10 to 10, but 'shoe' has 11"),
        ("((shoe:-5):3)", "weights must be from -10 to 10, but 'shoe' has -15"),
        ("(" * 300 + "shoe", "weights must be from -10 to 10, but 'shoe' has 2.6"),
        (f"((shoe:{'9' * 400}):0)", "weights must be from -10 to 10, but 'shoe' has nan"),
        ("(shoe:1.2.3)", "1.2.3 is not a number"),
        ("a BREAK " * (MOST_BREAKS + 1), "a prompt may have at most 15 BREAKs, not 16"),
        ("a" * 2001, "should have at most 2000 characters"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["prompt", "negative_prompt"])
def test_what_is_not_supported_is_refused_with_a_reason(prompt: str, reason: str, option: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        parse_options("stylize", "diffusion", {option: prompt})
    assert refused.value.message.startswith(f"{option}: ")
    assert reason in refused.value.message


@pytest.mark.parametrize(
    "prompt",
    [
        r"\[cat|dog\]",
        r"\[a:b:0.5\]",
        "[shoe] 3:4",
        "(a|b:1.2)",
        "sand, ANDY and",
        "a <3 b> c",
        "<b>",
        "bad hands, bad artist",
        "a negative image",
        "__ __",
        "snake__case",
        "{red}, a|b",
        "steps: 20",
        "embedding",
    ],
)
def test_text_that_only_resembles_unsupported_syntax_is_accepted(prompt: str) -> None:
    assert parse_options("stylize", "diffusion", {"prompt": prompt}).model_dump()["prompt"] == prompt
