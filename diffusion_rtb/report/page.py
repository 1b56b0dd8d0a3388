"""Write the page: read the subjects, make their sections, and put everything into one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffusion_rtb import __version__
from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.files.whole import size_text, write_text
from diffusion_rtb.report.frontier import frontiers, series
from diffusion_rtb.report.numbers import at, text
from diffusion_rtb.report.sections import sections, tiles
from diffusion_rtb.report.subject import Picture, Subject, read_subject
from diffusion_rtb.report.tables import overview
from diffusion_rtb.report.verdict import verdict

__all__ = ["LARGE", "page_text", "write_page"]

LARGE = 25_000_000
"""Bytes beyond which mail programs refuse an attachment."""

SMALL = 160
"""Pixels up to which a picture is enlarged with sharp pixels."""

TEMPLATES = Path(__file__).parent / "templates"

log = logging.getLogger(__name__)


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """One self-contained HTML file of one or several evaluations; the same files give the same bytes.

    Args:
        folders: Evaluations' folders (`RUN/eval`), or of runs that hold one.
        out: The file; its folder is made.

    Raises:
        ValueError: no folder, or one holds no metrics.json of this schema.
        DiskError: the page cannot be written.
    """
    if not folders:
        raise ValueError("A page needs at least one evaluated run or folder, got none.")
    whole = page_text([read_subject(Path(folder)) for folder in folders])
    out = out.expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, whole)
    size = out.stat().st_size
    if size > LARGE:
        log.warning(
            "%s has %s, more than many mail programs send; fewer subjects on a page make it smaller.",
            out,
            size_text(size),
        )
    return out


def page_text(subjects: Sequence[Subject]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever others wrote is shown with its control characters visible; autoescape takes care of markup.
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.filters |= {"source": _source, "number": text}
    environment.tests |= {"sharp": lambda picture: max(picture.width, picture.height) <= SMALL}
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    views = [_view(subject, i) for i, subject in enumerate(subjects)]
    pictures = [picture for subject in subjects for picture in (*subject.pictures, *filter(None, [subject.sheet]))]
    return environment.get_template("page.html").render(
        title=subjects[0].name if len(subjects) == 1 else f"{len(subjects)} subjects compared",
        views=views,
        several=len(subjects) > 1,
        overview=overview(subjects) if len(subjects) > 1 else None,
        frontiers=frontiers(subjects, "all") if len(subjects) > 1 else [],
        series=series(subjects),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        numbers={subject_key(i): subject.numbers for i, subject in enumerate(subjects)},
        version=__version__,
        pictures=f"{len(pictures)} pictures, {size_text(sum(len(picture.content) for picture in pictures))}",
    )


def subject_key(order: int) -> str:
    """Begins the ids of a subject."""
    return f"s{order + 1}"


def _view(subject: Subject, order: int) -> dict[str, Any]:
    """What the template needs of a subject."""
    key = subject_key(order)
    return {
        "key": key,
        "subject": subject,
        "recipe": at(subject.numbers, "subject", "recipe"),
        "verdict": verdict(subject),
        "tiles": list(tiles(subject)),
        "sections": sections(subject, key),
    }


def _source(picture: Picture) -> Markup:
    """The picture's bytes as the address of an image."""
    return Markup(f"data:{picture.kind};base64,{base64.b64encode(picture.content).decode()}")


def _policy(style: str, script: str) -> str:
    """Content security policy: nothing is loaded, and only our own style and script apply."""
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
