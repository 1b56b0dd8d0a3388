"""What an examination finds: sentences with a verdict each, and the numbers behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Examined", "Finding", "Verdict", "worst"]

Verdict = Literal["ok", "look", "stop"]
"""As it should be; worth a look before hours are spent; training would stop, or should not begin."""

SEVERITY: Sequence[Verdict] = ("ok", "look", "stop")


@dataclass(frozen=True)
class Finding:
    """One sentence."""

    verdict: Verdict
    text: str
    remedy: str = ""
    """The setting that helps, where the verdict is not ok and the text does not say it."""


@dataclass(frozen=True)
class Examined:
    """What one examination found."""

    findings: Sequence[Finding]
    rows: Sequence[tuple[str, str]] = ()
    """Lines of a small table: what, how much."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """For programs; what each is, and its unit, is in docs/doctor.md."""
    reached: bool = True
    """False where an earlier examination's failure left it without an answer."""
    cost: str = ""
    """What the run costs in this respect, as a part of the last sentence: "about 7 min of training"."""

    @property
    def verdict(self) -> Verdict:
        """The worst of its findings'."""
        return worst([finding.verdict for finding in self.findings])

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps(..., allow_nan=False)`."""
        found = [asdict(finding) for finding in self.findings]
        return {
            "verdict": self.verdict, "reached": self.reached, "findings": found, "numbers": _finite(self.numbers),
        }  # fmt: skip


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of some verdicts; ok if there are none."""
    return max(verdicts, key=SEVERITY.index, default="ok")


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has none for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
