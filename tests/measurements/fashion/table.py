"""The table of docs/fashion.md, between its two marks, from the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.estimates import VAGUE
from diffusion_rtb.files.whole import write_text

__all__ = ["write_table", "written"]

START, END = "<!-- table: python -m tests.measurements.fashion -->", "<!-- end of the table -->"
NAMES = {
    "prior": "prior",
    "dps": "classifier guidance, DPS",
    "lgd_mc": "classifier guidance, LGD-MC",
    "reinforce_kl": "REINFORCE with KL",
    "ddpo": "DDPO",
    "dpok": "DPOK",
    "rtb": "RTB",
    "vargrad": "VarGrad",
    "trust_pcl_v": "Trust-PCL with V",
    "value_gradient": "value_gradient",
    "rtb_after": "RTB, from value_gradient on",
    "reweighted": "**prior, re-weighted**",
    "real": "*real test pictures*",
}
COLUMNS = (
    ("n", "samples", 0),
    ("log_r", "E[log r]", 2),
    ("frechet", "Fréchet", 1),
    ("diversity", "diversity", 3),
    ("strength", "strength", 2),
    ("kl", "KL", 2),
)


def write_table(results: Mapping[str, Any], page: Path) -> None:
    """Replace what is between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} lacks the marks {START!r} and {END!r}, between which the table is written.")
    write_text(page, f"{before}{START}\n\n{written(results)}\n\n{END}{after}")


def written(results: Mapping[str, Any]) -> str:
    """One table over single classes, mean ± standard deviation, and one of the tops; then what they are of."""
    targets = [name for name in results if name not in ("hardware", "tops")]
    parts = []
    if targets:
        parts.append(f"Single classes ({', '.join(targets)}), mean ± standard deviation over those that a row has:")
        parts.append(_table([results[name] for name in targets]))
    if "tops" in results:
        parts += ["Tops (t-shirt, pullover, coat and shirt) against the rest:", _table([results["tops"]])]
    if "hardware" in results:
        parts.append(f"On {results['hardware']}.")
    return "\n\n".join(parts)


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [["", "classes", *(title for _, title, _ in COLUMNS)], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    for method, name in NAMES.items():
        rows = [item[method] for item in found if method in item]
        if rows:
            lines.append([name, str(len(rows)), *(_cell(rows, key, digits) for key, _, digits in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _untold(row: Mapping[str, Any]) -> bool:
    """Rewards are so alike that the slope tells nothing: its standard error is |slope|·sqrt((1/r² - 1)/(n - 2))."""
    if not row["r2"]:
        return True
    return abs(row["strength"]) * math.sqrt((1 / row["r2"] - 1) / (row["n"] - 2)) > VAGUE


def _cell(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row.get(key) is not None and not (key == "strength" and _untold(row))]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if digits and len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
