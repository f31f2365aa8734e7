"""Embeddings of prompts, with one text encoder (Stable Diffusion 1.5) and two (SDXL), all small and random."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.stylize import prompts as module
from imagemill.worker.operations.stylize.pipeline import Pipeline
from imagemill.worker.operations.stylize.prompts import BACKTRACK, LENGTH, Prompts, about_pieces, pieces, weighted
from tests.pipelines import diffusers, letters

FULL = "a " * LENGTH
"""A full piece: the small tokenizer knows no words, so each letter is a token."""


@pytest.fixture(scope="module")
def sd15(weights: Path) -> Any:
    return Pipeline("sd15-canny", Device(weights=weights))._text


@pytest.fixture(scope="module")
def sdxl() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    common = dict(vocab_size=600, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one = CLIPTextModel(CLIPTextConfig(hidden_size=32, **common))
        two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=48, projection_dim=40, **common))
    return diffusers().StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=CLIPTokenizer(letters(), [], model_max_length=77),
        tokenizer_2=CLIPTokenizer(letters(), [], model_max_length=77, pad_token="!"),
        add_watermarker=False,
    )


@pytest.fixture(params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def embedded(pipe: Any, prompt: str, negative: str = "blurry", *, count: int = 1, cfg: float = 7.5) -> dict[str, torch.Tensor]:
    """The arguments that Prompts gives to a pipeline."""
    options = DiffusionStylize(prompt=prompt, negative_prompt=negative, cfg=cfg)
    with torch.no_grad():
        return Prompts(pipe).of(options).arguments(count)


def of_diffusers(pipe: Any, prompt: str, negative: str | None = None) -> dict[str, torch.Tensor]:
    """The arguments that diffusers' own encoder makes of prompts up to 75 tokens long."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=negative or None,
        )
    return {name: value for name, value in zip(names, found, strict=False) if value is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("prompt", ["a red shoe", "", "ratio 16:9, | <3", FULL, "Red, SHOE,\n"])
def test_plain_prompts_have_the_embeddings_of_diffusers(prompt: str, pipe: Any) -> None:
    assert_equal(embedded(pipe, prompt, "blurry, noise"), of_diffusers(pipe, prompt, "blurry, noise"))
    assert_equal(embedded(pipe, prompt, ""), of_diffusers(pipe, prompt, ""))
    assert_equal(embedded(pipe, prompt, cfg=1), of_diffusers(pipe, prompt))


def test_long_prompts_are_embedded_in_pieces(pipe: Any) -> None:
    found = embedded(pipe, FULL + "b c BREAK d", "e")
    for start, (prompt, negative) in enumerate([(FULL, "e"), ("b c", " "), ("d", " ")]):
        piece = of_diffusers(pipe, prompt, negative)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            assert torch.equal(found[name][:, start * 77 : (start + 1) * 77], piece[name]), (start, name)
    first = of_diffusers(pipe, FULL, "e")
    for name in {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"} & first.keys():
        assert torch.equal(found[name], first[name]), "of the first piece"


def test_the_shorter_prompt_is_filled_up_with_empty_pieces(pipe: Any) -> None:
    found = embedded(pipe, "a shoe", FULL + FULL + "b")
    assert found["prompt_embeds"].shape == found["negative_prompt_embeds"].shape
    assert found["prompt_embeds"].shape[:2] == (1, 3 * 77)
    assert torch.equal(found["prompt_embeds"][:, 77:], of_diffusers(pipe, "")["prompt_embeds"].repeat(1, 2, 1))


def test_weights_multiply_embeddings_and_keep_the_mean_of_each_piece(pipe: Any) -> None:
    found = embedded(pipe, "(ab:1.5)c BREAK [d]")["prompt_embeds"]
    widths = [32] if found.shape[-1] == 32 else [32, 48]
    for piece, (plain, weights) in enumerate([("ab c", [1.5, 1.5, 1]), ("d", [1 / 1.1])]):
        factors = torch.ones(77)
        factors[1 : len(weights) + 1] = torch.tensor(weights)
        before = of_diffusers(pipe, plain)["prompt_embeds"].split(widths, dim=-1)
        after = found[:, piece * 77 : (piece + 1) * 77].split(widths, dim=-1)
        for one, other in zip(before, after, strict=True):
            scaled = one * factors[:, None]
            assert torch.allclose(other, scaled * (one.mean() / scaled.mean()), atol=1e-6)
            assert torch.allclose(other.mean(), one.mean(), atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-9])
@pytest.mark.parametrize("weight", [1.5, 0.0])
def test_embeddings_with_a_mean_of_0_are_only_multiplied(mean: float, weight: float) -> None:
    """As of a text encoder whose last layer normalises without a bias."""
    hidden = torch.tensor([1.0, -1.0]).repeat(1, 77, 4) + mean
    found = weighted(hidden, [(5, weight)])
    expected = hidden.clone()
    expected[:, 1] *= weight
    assert torch.equal(found, expected)


@pytest.mark.parametrize("prompt", ["([a shoe])", "(a shoe:1)", "(a shoe:1.0)"])
def test_weights_of_one_change_nothing(prompt: str, pipe: Any) -> None:
    found = embedded(pipe, prompt)
    assert torch.allclose(found["prompt_embeds"], embedded(pipe, "a shoe")["prompt_embeds"], atol=1e-6)


def test_every_image_of_a_batch_gets_the_same_embeddings(pipe: Any) -> None:
    one, three = (embedded(pipe, "a (red:1.3) shoe BREAK " + FULL, count=count) for count in (1, 3))
    for name, value in three.items():
        assert torch.equal(value, torch.cat([one[name]] * 3)), name


def test_half_precision_stays(sdxl: Any) -> None:
    half = copy.deepcopy(sdxl).to(torch.bfloat16)
    assert {value.dtype for value in embedded(half, "a (red:1.3) shoe").values()} == {torch.bfloat16}


# --- where pieces end ---


def cut(pipe: Any, prompt: str) -> list[str]:
    return [pipe.tokenizer.decode([token for token, _ in piece]).replace(" ", "") for piece in pieces(prompt, pipe.tokenizer)]


def words(count: int) -> str:
    return "a " * count


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (words(75), ["a" * 75]),
        (words(76), ["a" * 75, "a"]),
        (words(160), ["a" * 75, "a" * 75, "a" * 10]),
        (words(60) + ", " + words(20), ["a" * 60 + ",", "a" * 20]),
        (words(55) + ", " + words(20), ["a" * 55 + ",", "a" * 20]),
        (words(54) + ", " + words(21), ["a" * 54 + "," + "a" * 20, "a"]),
        (words(10) + ", " + words(49) + ", " + words(20), ["a" * 10 + "," + "a" * 49 + ",", "a" * 20]),
        (words(74) + ", b", ["a" * 74 + ",", "b"]),
        (words(60) + ", " + words(14) + ", b", ["a" * 60 + "," + "a" * 14, ",b"]),
        (words(60) + ", " + words(74) + ", b", ["a" * 60 + ",", "a" * 74 + ",", "b"]),
        (words(60) + ", " + words(14), ["a" * 60 + "," + "a" * 14]),
        ("a BREAK b", ["a", "b"]),
        (words(75) + " BREAK b", ["a" * 75, "b"]),
        ("a BREAK", ["a"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("", [""]),
        ("BREAK", [""]),
        (words(60) + ", BREAK " + words(76), ["a" * 60 + ",", "a" * 75, "a"]),
    ],
    ids=range(19),
)
def test_pieces_end_where_those_of_a1111_end(prompt: str, expected: list[str], sd15: Any) -> None:
    assert cut(sd15, prompt) == expected


@given(st.lists(st.sampled_from("ab,"), max_size=300))
def test_pieces_hold_all_tokens_in_order(sd15: Any, tokens: list[str]) -> None:
    found = cut(sd15, " ".join(tokens))
    assert "".join(found) == "".join(tokens)
    assert all(LENGTH - BACKTRACK < len(piece) <= LENGTH for piece in found[:-1])


# --- what is remembered ---


def test_recent_embeddings_are_remembered_within_a_limit(sd15: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 8)
    prompts = Prompts(sd15)

    def known(*asked: str) -> list[str]:
        with torch.no_grad():
            for prompt in asked:
                prompts.of(DiffusionStylize(prompt=prompt, negative_prompt="blurry"))
        return [key[0] for key in prompts._known]

    assert known(*"abcde") == ["b", "c", "d", "e"], "each in two pieces"
    assert known("b") == ["c", "d", "e", "b"]
    assert known(FULL + "f") == ["e", "b", FULL + "f"]
    assert known(FULL * 5) == [FULL * 5], "the job at hand, however long its prompt"
    assert known("a") == ["a"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt": ""}, 1),
        ({"prompt": "a" * 300}, 1),
        ({"prompt": "a" * 301}, 2),
        ({"negative_prompt": "a" * 901}, 4),
        ({"negative_prompt": "a" * 901, "cfg": 1}, 1),
        ({"prompt": "a BREAK b BREAK " + "c" * 400}, 4),
    ],
)
def test_pieces_are_estimated_without_the_tokenizer(options: dict[str, Any], expected: int) -> None:
    assert about_pieces(DiffusionStylize(**options)) == expected
