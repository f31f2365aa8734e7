"""The README's table of settings against the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr

from imagemill.shared.settings import Settings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| (.+?) \|", README, re.MULTILINE))
IN_WORDS = {
    "S3__ENDPOINT_URL",
    "S3__PUBLIC_URL",
    "WORKER__GPU",
    "WORKER__OPERATIONS",
    "WEIGHTS__MIRROR",
    "ONNX__GPU_MEM_LIMIT",
    "PRESETS",
}


def settings(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Name after `IMAGEMILL_`, and default."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from settings(type(field.default), f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}", field.default


@pytest.mark.parametrize(("name", "default"), list(settings()))
def test_the_readme_has_each_setting_with_its_default(name: str, default: object) -> None:
    shown = ROWS[name].strip("`")
    if name in IN_WORDS:
        return
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, tuple):
        default = "[" + ", ".join(f'"{part}"' for part in default) + "]"
    if isinstance(default, bool):
        default = str(default).lower()
    assert shown == (f"{default:g}" if isinstance(default, float) else f"{default}")


def test_the_readme_has_no_setting_that_is_gone() -> None:
    assert set(ROWS) == {name for name, _ in settings()}
