"""How a wait ends when its image is no longer wanted here."""

from __future__ import annotations

GLANCE = 0.1
"""Seconds between two looks at whether the wait still makes sense."""


class Stopped(Exception):
    """The image has not begun and must not begin: it stays unrecorded and is handed out again."""
