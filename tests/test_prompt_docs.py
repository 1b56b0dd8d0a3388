"""docs/prompts.md is true: its file, its reward and its config work together."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import load_config
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.scoring.call import evaluate_reward

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/prompts.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    return str(found)


def test_its_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "colour_reward.py").write_text(block("python"))
    (tmp_path / "prompts.jsonl").write_text(block("jsonl"))
    (tmp_path / "config.yaml").write_text(block("yaml"))
    importlib.invalidate_caches()
    config = load_config(tmp_path)
    describe_components(config)
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = images[1, 2] = 1
    table = config.prompts.table()
    reward = build(config.reward, "reward")
    assert evaluate_reward(reward, images, table.texts, "colour", metadata=table.metadata).tolist() == [1.0, -0.5]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match="'a' has no `colour` among red, green, blue"):
        describe_components(load_config(tmp_path))
