"""The commands about rewards, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rtb.cli.main import main
from rewards.remote import Remote
from tests.oracles.serving import await_health, free_port


def leave(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    code = left.value.code
    assert isinstance(code, int)
    return code


def test_check_reward_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert leave("check-reward", "jpeg", "brightness", "--size", "64", "--json", str(report)) == 0
    shown = capsys.readouterr().out
    assert "Reward jpeg" in shown
    assert "Reward brightness" in shown
    found = json.loads(report.read_text())
    assert [one["name"] for one in found["rewards"]] == ["jpeg", "brightness"]
    assert all(one["passed"] for one in found["rewards"])


def test_arguments_stand_after_their_reward(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ["jpeg", "sign=incompress", "jpeg", "quality=80", "--size", "64", "--json", str(report)]
    assert leave("check-reward", *words) == 0
    large, small = json.loads(report.read_text())["rewards"]
    assert large["statistics"]["mean"] > 0 > small["statistics"]["mean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check-reward", "jpgg"], "mean 'jpeg'"),
        (["check-reward", "quality=80"], "no reward stands before it"),
        (["check-reward", "jpeg", "quality=80", "quality=90"], "with each key once"),
        (["check-reward", "jpeg", "qualty=80"], "qualty"),
        (["check-reward", "jpeg", "--images", "a", "--dim", "2"], "give one of them"),
        (["serve-reward"], "Which reward?"),
        (["serve-reward", "--reward", "jpeg", "quality"], "key=value"),
        (["serve-reward", "--reward", "jpeg", "--host", "0.0.0.0"], "DIFFUSION_RTB_TOKEN"),
    ],
)
def test_bad_words_get_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(*words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_served_reward_is_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rewards.jpeg import Jpeg

    port, token = free_port(), "a-token-of-this-test-0123456789"
    monkeypatch.setenv("DIFFUSION_RTB_TOKEN", token)
    words = ["serve-reward", "--reward", "jpeg", "--port", str(port), "quality=70"]
    start = [sys.executable, "-c", "from diffusion_rtb.cli.main import main; main()", *words]
    server = subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        await_health(port)
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        prompts = ["a cat"] * 5
        assert torch.equal(Remote(f"http://127.0.0.1:{port}")(images, prompts), Jpeg(quality=70)(images, prompts))
    finally:
        server.terminate()
        assert server.wait(20) in (0, -15)
