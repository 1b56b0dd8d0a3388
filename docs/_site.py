"""What lies outside docs/ for the site: READMEs become pages, pictures are copied, links to other files become their paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "rewards/README.md": "there/rewards.md",
    "diffusion_rtb/objectives/README.md": "there/objectives.md",
    "pipelines/emoji/README.md": "there/emoji.md",
    "examples/other_environment/README.md": "there/other_environment.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the site by the files they are made from."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the pictures they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in [*(ROOT / "configs").glob("*.png"), *(ROOT / "pipelines").glob("*/*.png")]:
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead each relative link to the page, or say the path of a file that is none."""
    place = page.file.src_uri
    source = next((path for path, made in PAGES.items() if made == place), f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups()
        path = os.path.normpath(Path(source).parent / target).replace(os.sep, "/")
        inside = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None:
            return text if path in text else f"{text} (`{path}`)"
        return f"{mark}[{text}]({os.path.relpath(inside, Path(place).parent)}{anchor or ''})"

    blocks = CODE.findall(markdown)
    parts = [LINK.sub(lead, part) for part in CODE.split(markdown)]
    return "".join(part + block for part, block in zip(parts, [*blocks, ""], strict=True))
