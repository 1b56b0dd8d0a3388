"""Rewards of other people: a package that pip installs, a dotted path, a plain function."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build, describe, locate, short_names
from tests.oracles.serving import ROOT
from tests.oracles.tiny import save_tiny

PACKAGE = ROOT / "tests" / "third_party_reward"

CONFIG = """
prior: {{component: stable_diffusion, path: prior, steps: 2}}
reward: {reward}
beta: 1.0
posterior: {{rank: 1, alpha: 1.0}}
prompts: {{list: [a cat]}}
behaviours: [{{component: prior_buffer, share: 0.5, capacity: 2}}]
train: {{iterations: 1, prompts_per_iteration: 1, group: 2, micro_batch: 2, grid_every: 0}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip really built and installed the example; nothing is downloaded and the checkout stays clean."""
    folder = tmp_path_factory.mktemp("third_party")
    source = Path(shutil.copytree(PACKAGE, folder / "source"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    done = subprocess.run([*command, *offline, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def theirs(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(installed)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("redness_reward", None)


def images() -> torch.Tensor:
    """One red, one grey, one half red and half blue."""
    found = torch.zeros(3, 3, 4, 4)
    found[0, 0] = 1
    found[1] = 0.5
    found[2, 0, :2] = 1
    found[2, 2, 2:] = 1
    return found


def test_without_the_package_its_name_is_unknown() -> None:
    assert "redness" not in short_names("reward")
    with pytest.raises(ValueError, match="There is no reward named 'redness'"):
        locate("redness", "reward")


@pytest.mark.usefixtures("theirs")
def test_an_installed_class_and_an_installed_function_go_by_their_names() -> None:
    assert {"redness", "red_share", "jpeg"} <= set(short_names("reward"))
    assert build({"component": "redness", "scale": 2}, "reward")(images(), [""] * 3).tolist() == [2.0, 0.0, 0.5]
    largest = build({"component": "redness", "against": "max"}, "reward")
    assert largest(images(), [""] * 3).tolist() == [1.0, 0.0, 0.0]
    assert build({"component": "red_share"}, "reward")(images(), [""] * 3).tolist() == [1.0, 0.0, 0.5]
    assert build({"component": "red-share", "threshold": 1}, "reward")(images(), [""] * 3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["redness", "redness_reward:Redness"])
@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"scal": 1.0}, "no argument 'scal'. Did you mean 'scale'"),
        ({"scale": "much"}, "argument 'scale': got 'much'"),
        ({"against": "median"}, "Input should be 'mean' or 'max'"),
        ({"scale": 0.0}, "scale is 0: every image"),
    ],
)
def test_their_arguments_are_checked_like_ours(name: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        describe({"component": name, **arguments}, "reward")


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    "reward",
    [
        "{component: redness, scale: 2.0}",
        '{component: "redness_reward:red_share", threshold: 0.2}',
        "{component: weighted_sum, rewards: [{component: redness, weight: 3.0}, {component: red_share}]}",
    ],
)
def test_a_config_trains_with_it(reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "prior")
    (tmp_path / "red.yaml").write_text(CONFIG.format(reward=reward))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["train", "red.yaml"])
    assert done.value.code == 0
    (line,) = (tmp_path / "runs" / "red" / "metrics.jsonl").read_text().splitlines()
    assert -5 < json.loads(line)["reward"] < 5


def test_a_new_process_finds_it_too(installed: Path) -> None:
    """No test's path tricks: the interpreter is told of the folder as an environment would."""
    code = (
        f"import site; site.addsitedir({str(installed)!r})\n"
        "import sys\n"
        "from diffusion_rtb.config.components import short_names\n"
        "sys.stdout.write(short_names('reward')['redness'])\n"
        "assert 'redness_reward' not in sys.modules, 'listing imports nothing'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "redness_reward:Redness"
