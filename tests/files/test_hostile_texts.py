"""Every command, with prompts, names and paths that are markup, escape sequences and HTML: they come out as text."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from diffusion_rtb.cli.main import main
from tests.oracles.tiny import save_tiny

PROMPTS = ["[/nope]", "[red]ink[/red] :smile:", "\x1b]0;pwned\x07\x1b[31mx", "`|<img src=x onerror=y>$a$\\", "猫" * 300]
FOLDER = "we[red]ird [@x] $x$ \x1b[31m`|<b>"

REWARD = """
class Weird:
    def __init__(self, note=""):
        pass

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)

    def classify(self, images, classes):
        return images.flatten(1)[:, : len(classes)]
"""

CONFIG: dict[str, Any] = {
    "name": "hostile",
    "prior": {"component": "stable_diffusion", "path": "tiny", "steps": 2},
    "reward": {"component": "weird_reward:Weird", "note": "[/nope] `|\x1b[31m"},
    "beta": 2.0,
    "posterior": {"rank": 2, "alpha": 2.0},
    "prompts": {"list": PROMPTS},
    "train": {"iterations": 1, "prompts_per_iteration": 5, "group": 2, "micro_batch": 10, "grid_samples": 1},
    "eval": {
        "samples": 2,
        "prior_samples": 2,
        "bootstrap": 5,
        "labeller": {"component": "weird_reward:Weird"},
        "factors": [{"name": "[/f]\x1b[31m", "classes": ["a", "b"], "labels": ["[/a]", "\x1b]0;pwned\x07"]}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile folder with a run that is trained."""
    path = tmp_path_factory.mktemp("hostile") / FOLDER
    path.mkdir()
    save_tiny(path / "tiny")
    (path / "weird_reward.py").write_text(REWARD)
    (path / "weird.yaml").write_text(yaml.safe_dump(CONFIG))
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(argv))
    said = capsys.readouterr()
    assert (left.value.code or 0) == code, said.err
    return said.out, said.err


def harmless(*texts: str) -> None:
    """No escape sequence, and nothing else that a terminal obeys, in output that is not coloured."""
    for text in texts:
        found = re.search(r"[^\n\t\x20-\x7e\x80-\U0010ffff]|[\x80-\x9f\u202a-\u202e]", text)
        assert found is None, text[max(0, found.start() - 80) : found.end() + 80]


def test_every_command_shows_texts_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    config, where = (
        str(folder / "weird.yaml"),
        [f"out={json.dumps(str(folder))}", f"prior.path={json.dumps(str(folder / 'tiny'))}"],
    )
    trained = str(folder / "hostile")
    harmless(*run(capsys, "train", config, *where))
    card = (folder / "hostile" / "lora" / "README.md").read_text()
    harmless(card)

    out, err = run(capsys, "eval", trained)
    harmless(out, err)
    for shown in ("[/nope]", "[red]ink[/red] :smile:", r"\x1b]0;pwned\x07\x1b[31mx", PROMPTS[3], "[/f]", "[/a]"):
        assert shown in out
    assert r"we[red]ird [@x] $x$ \x1b[31m`|<b>" in err

    out, _ = run(capsys, "config", trained)
    harmless(out)
    assert yaml.safe_load(out)["prompts"]["list"] == PROMPTS
    pictures = str(folder / "pictures")
    harmless(*run(capsys, "sample", trained, "-n", "1", "--out", pictures))
    harmless(*run(capsys, "check-reward", config, "--prior", config.replace("weird.yaml", "hostile"), "-n", "5"))
    for argv in (
        ["train", str(folder / "no\x1b[31m[/x].yaml")],
        ["eval", trained, "eval.[/x]\x1b[31m=1"],
        ["config", config, "reward.component='[/x]\x1b[31m'"],
        ["config", config, "beta=\x1b[31m[/x]"],
        ["check-reward", "[/x]\x1b[31m"],
        ["compare", config, "--objectives", "[/x]\x1b[31m"],
        ["serve-reward", "--reward", "[/x]\x1b[31m"],
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        said = capsys.readouterr()
        harmless(said.out, said.err)
        assert left.value.code in (1, 2)
        assert "[/x]" in said.err


def test_bars_and_tables_of_a_terminal_do_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    config, where = (
        str(folder / "weird.yaml"),
        [f"out={json.dumps(str(folder))}", f"prior.path={json.dumps(str(folder / 'tiny'))}"],
    )
    told = [*run(capsys, "train", config, *where, "name=bars"), *run(capsys, "eval", str(folder / "bars"))]
    for text in told:
        assert "\x1b]0;" not in text
        assert "\x07" not in text
    assert "[/nope]" in told[2]


def test_the_card_says_every_text() -> None:
    """Front matter, table and blocks read back as what was put in, by an independent Markdown parser."""
    from diffusion_rtb.run.model_card import model_card
    from diffusion_rtb.run.progress import Progress

    nasty = "a`b``|<img>$x$ _y_ ![z](javascript:1)"
    config = {**CONFIG, "name": "n", "reward": {"component": nasty}, "objective": {"component": "rtb"}, "seed": 1}
    config["prompts"] = {"list": ["```\n# heading\n```", *PROMPTS]}
    text = model_card(
        config,
        base_model=nasty,
        snippet="x = 1\n```\n# no",
        fingerprint={},
        trained=Progress(2, 2, 1.0),
        evaluation={nasty: {"prior": nasty, "posterior": 1}},
    )
    tokens = MarkdownIt().enable("table").parse(text.split("---\n", 2)[2])
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["n", "Use it with plain diffusers", "Recipe", "Evaluation", "Full configuration"]
    fences = {token.info: token.content for token in tokens if token.type == "fence"}
    assert fences["python"] == "x = 1\n```\n# no\n"
    assert yaml.safe_load(fences["yaml"]) == json.loads(json.dumps(config))
    inline = [token.children or [] for token in tokens if token.type == "inline"]
    kinds = {child.type for children in inline for child in children}
    assert not kinds & {"html_inline", "link_open", "image", "em_open"}
    cells = ["".join(child.content for child in children) for children in inline]
    assert cells.count(nasty) == 3, cells


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    from diffusion_rtb.comparison.figure import draw_figure
    from diffusion_rtb.comparison.table import markdown, rows, write_tables
    from tests.comparison.test_compare_output import comparison

    found = comparison(tmp_path, {("$\\frac{$", "a|b\x1b"): [0.1], ("<b>", "[/x]"): [0.2]})
    assert draw_figure(found).is_file()
    text = markdown(found)
    harmless(text)
    table = [token for token in MarkdownIt().enable("table").parse(text) if token.type == "tr_open"]
    assert len(table) == 1 + len(rows(found))
    write_tables(found)
    lines = list(csv.reader(io.StringIO((found.plan.folder / "table.csv").read_text())))
    assert "$\\frac{$" in {line[0] for line in lines}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_a_terminal_without_unicode_gets_escapes(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**CONFIG, "prompts": {"list": PROMPTS}}), encoding="utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "a.yaml"), "--print-config"])
    assert not left.value.code
    sys.stdout.flush()
    assert "\\u732b" * 300 in raw.getvalue().decode(encoding).replace("\n", "").replace(" ", "")
