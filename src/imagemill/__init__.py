"""imagemill: retouch images in bulk.

The public Python API. Names load on first use, so `import imagemill` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagemill.producer.client import Client, Submission
    from imagemill.producer.sources import BadRow, SourceRow, read_sources
    from imagemill.shared.errors import (
        BrokerUnavailable,
        ConfigurationError,
        ImagemillError,
        InvalidOption,
        InvalidPreset,
        InvalidSource,
        JobNotFound,
        MissingExtra,
        ServiceUnavailable,
        UsageError,
    )
    from imagemill.shared.messages import Item, ItemResult, Job, JobStatus, Output, Policy, Row
    from imagemill.shared.settings import Settings, load_settings

__all__ = [
    "BadRow",
    "BrokerUnavailable",
    "Client",
    "ConfigurationError",
    "ImagemillError",
    "InvalidOption",
    "InvalidPreset",
    "InvalidSource",
    "Item",
    "ItemResult",
    "Job",
    "JobNotFound",
    "JobStatus",
    "MissingExtra",
    "Output",
    "Policy",
    "Row",
    "ServiceUnavailable",
    "Settings",
    "SourceRow",
    "Submission",
    "UsageError",
    "load_settings",
    "read_sources",
]

_MODULES = {
    "producer.client": ("Client", "Submission"),
    "producer.sources": ("BadRow", "SourceRow", "read_sources"),
    "shared.messages": ("Item", "ItemResult", "Job", "JobStatus", "Output", "Policy", "Row"),
    "shared.settings": ("Settings", "load_settings"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'shared.errors')}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
