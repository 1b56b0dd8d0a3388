"""The error of numbers that came to no end, by which a training that diverged is told from one that could not start."""

from __future__ import annotations

__all__ = ["NotFiniteError"]


class NotFiniteError(ValueError):
    """A number is NaN, infinite, or so large that others vanish beside it; the message says which, and what to change."""
