"""The documents as text: their code blocks, their commands, their links and their headings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(
            path
            for name in ("diffusion_rtb", "examples", "pipelines", "rewards", "tests")
            for path in (ROOT / name).rglob("*.md")
        ),
    ]
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Commands in `sh` blocks, and indented ones that begin like ours, split as a shell would, without their comments."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}((?:python (?:train|eval)\.py|diffusion-rtb) .*)$", text, flags=re.MULTILINE)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(text: str) -> str:
    """Without code: what looks like a link in it is none."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """What a heading is reached by: lower case, without punctuation, spaces as hyphens."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
