"""The README is true: its code runs, its first commands are those of the Makefile, and its loop is the example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.documents import ROOT, blocks, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_commands_are_the_two_of_the_makefile() -> None:
    assert [" ".join(words) for words in commands(README)[:2]] == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", " ".join([*re.findall("`(make [a-z]+)", README), "make quickstart"])):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_it_is_short_and_begins_with_a_picture_and_a_command() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("![") for line in lines[:12])
    assert any(line.startswith("make ") for line in lines[:20])
    assert "@@" not in README
    assert "TODO" not in README


def test_its_second_code_block_is_the_example() -> None:
    example = (ROOT / "examples" / "rtb_loop.py").read_text(encoding="utf-8")
    assert blocks(README, "python")[1] in example
    assert "replay_backward" in blocks(README, "python")[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that looks like the clone to the README's code, with a trained LoRA in runs/quickstart."""
    weights = tmp_path / "pipelines" / "emoji"
    weights.mkdir(parents=True)
    (weights / "weights").symlink_to(ROOT / "pipelines" / "emoji" / "weights")
    monkeypatch.chdir(tmp_path)
    prior = StableDiffusion(path="emoji", scheduler="DDPMScheduler", timesteps=[999, 500])
    prior.attach(rank=1, alpha=1.0)
    prior.export(tmp_path / "runs" / "quickstart" / "lora", card="")
    return tmp_path


def test_the_python_blocks_run(project: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(README, "python"):
        exec(block.replace("ITERATIONS = 1.0, 256, 100", "ITERATIONS = 1.0, 8, 2"), names)
    assert len(names["images"]) == 4
