"""A reward is hacked on purpose on the bundled prior, and the alarm comes; a run of the same length under a KL raises none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.config.load import load_config
from diffusion_rtb.training.assemble import assemble
from tests.oracles.behaving import rows

ROOT = Path(__file__).parents[2]

SMALL = [
    "prior.steps=4",
    "prompts.list=[a rocket emoji]",
    "train.iterations=6",
    "train.prompts_per_iteration=1",
    "train.micro_batch=8",
    "watch.every=6",
]
HACKED = ["train.lr=1e-2"]
HEALTHY = ["objective={component: reinforce_kl}", "beta=5.0"]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("name", "how", "alarm"), [("hacked", HACKED, 1.0), ("healthy", HEALTHY, 0.0)])
def test_hacking_is_seen_and_health_is_not_taken_for_it(
    name: str, how: list[str], alarm: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(ROOT / "configs" / "hacking.yaml", [f"name={name}", f"out={tmp_path}", *SMALL, *how])
    trainer = assemble(config)
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    looks: list[dict[str, Any]] = [row for row in rows(trainer) if "watch/alarm" in row]
    assert [look["watch/alarm"] for look in looks] == [0.0, alarm]
    before, after = looks
    picture = trainer.folder / "watch" / "000006.png"
    if alarm:
        assert after["watch/reward"] > before["watch/reward"] + 0.2
        assert after["watch/judge/clip_score"] < before["watch/judge/clip_score"] - 0.05
        assert "looks hacked at iteration 6" in caplog.text
        assert "clip_score fell by" in caplog.text
        assert picture.is_file()
    else:
        assert "hacked" not in caplog.text
        assert not picture.exists()
