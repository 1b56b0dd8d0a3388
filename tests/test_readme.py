"""The README is true: its code runs, its commands are valid, its files exist, and its list of metrics is complete."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import load_config
from diffusion_rtb.config.yaml_text import read_yaml
from diffusion_rtb.run.checks import describe_components
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = """
prior: {component: stable_diffusion, path: tiny, steps: 2, dtype: float16}
reward: {component: jpeg}
beta: {value: 1.0, kl_budget: {nats: 1.0}}
posterior: {rank: 1, alpha: 1.0}
prompts: {list: [a cat]}
behaviour:
  {prior_share: 0.25, prior_buffer: 2, replay: {share: 0.25}, back_and_forth: {share: 0.25}}
train: {iterations: 1, prompts_per_iteration: 1, group: 4, micro_batch: 4, grid_every: 0}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The commands of all sh blocks, split as a shell would, without their comments."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_first_commands_are_the_two_of_the_makefile() -> None:
    assert [" ".join(words) for words in commands()[:2]] == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", " ".join(" ".join(words) for words in commands())):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_it_is_short_and_finished() -> None:
    assert len(README.splitlines()) <= 200
    assert "@@" not in README
    assert "TODO" not in README


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link


def test_every_file_it_names_exists() -> None:
    # What a run makes is not in the repository.
    named = re.findall(r"(?:configs|diffusion_rtb|pipelines|rewards|tests)/[\w./-]*\w", README)
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "words", [words for words in commands() if "train.py" in words or "train" in words], ids=" ".join
)
def test_training_commands_are_valid(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = words[words.index("train.py" if "train.py" in words else "train") + 1 :]
    describe_components(load_config(arguments[0], [word for word in arguments[1:] if not word.startswith("-")]))


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "diffusion-rtb"], ids=" ".join)
def test_options_of_commands_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([words[1], "--help"])
    told = capsys.readouterr().out
    for option in words[2:]:
        if option.startswith("-"):
            assert re.search(rf"(?<!\S){re.escape(option)}\b", told), option


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that looks like the clone to the README's code, with a trained LoRA in runs/sd15_clip."""
    weights = tmp_path / "pipelines" / "emoji"
    weights.mkdir(parents=True)
    (weights / "weights").symlink_to(ROOT / "pipelines" / "emoji" / "weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_python_blocks_run(project: Path) -> None:
    prior = StableDiffusion(path="emoji", steps=2)
    prior.attach(rank=1, alpha=1.0)
    prior.export(project / "runs" / "sd15_clip" / "lora", card="")
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)


def test_the_reward_of_the_readme_is_a_reward(project: Path) -> None:
    source = next(block for block in blocks("python") if "def __call__(self, images, prompts)" in block)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    (project / "my_reward.py").write_text(source, encoding="utf-8")
    importlib.invalidate_caches()
    written = re.search(r"`reward: (\{component: \"?my_reward:.*?\})`", README)
    assert written is not None
    reward = build(read_yaml(written.group(1)), "reward")
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1
    assert reward(images, ["a", "b"]).tolist() == [2.0, 0.0]


def test_every_logged_metric_is_explained_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "small.yaml"])
    (line,) = (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    logged = {re.sub(r"/.*", "/…", name) for name in json.loads(line)} - {"iteration"}
    table = README.partition("## What is logged")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == logged
