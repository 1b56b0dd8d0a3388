"""A command opens and hashes each file of the checkpoint, and of the memories it refers to, once, whatever it needs it for."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from diffusion_rtb.cli.main import main
from diffusion_rtb.run.memories import sha256

CONFIG = """
prior: {component: gaussian, mean: [1.0, -2.0], covariance: [[2.0, 0.6], [0.6, 0.5]], steps: 4}
reward: {component: density, density: {mean: [2.0, -1.0], precision: [[1.0, 0.3], [0.3, 2.0]]}}
beta: 1.5
prompts: {list: [""]}
behaviours: [{component: replay, share: 0.25}]
train: {iterations: 2, prompts_per_iteration: 1, group: 8, micro_batch: 8, lr: 0.03, checkpoint_every: 2, grid_every: 0}
eval: {samples: 8, prior_samples: 8, batch: 8, bootstrap: 5}
"""

opened: Counter[str] = Counter()
"""How often Python opened each file for reading, by name, while WATCHED is a folder that holds it."""
watched: list[Path] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and watched and isinstance(arguments[0], str) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = Path(arguments[0])
        if watched[0] in path.absolute().parents and not path.is_dir():
            opened[path.name] += 1


@pytest.fixture(scope="module")
def audited() -> None:
    sys.addaudithook(_watch)


@pytest.mark.parametrize(
    "arguments", [["train", "runs/g", "train.iterations=3"], ["eval", "runs/g"], ["sample", "runs/g", "-n", "1"]]
)
def test_each_file_is_opened_and_hashed_once(
    audited: None, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit):
        main(["train", "g.yaml"])
    files = {path.name: path.read_bytes() for path in Path("runs/g/checkpoints").rglob("*.*") if path.is_file()}
    assert {"posterior.safetensors", "optimizer.safetensors", "state.json", "manifest.json"} <= files.keys()
    assert any(name.startswith("00000002-") for name in files), "a memory"

    hashed: Counter[bytes] = Counter()

    def counted(content: bytes) -> str:
        hashed[content] += 1
        return sha256(content)

    def past_python(*_: Any, **__: Any) -> None:
        raise AssertionError("opened where the count does not see it")

    monkeypatch.setattr("diffusion_rtb.run.checkpoint_reading.sha256", counted)
    monkeypatch.setattr(safetensors.torch, "safe_open", past_python)
    opened.clear()
    watched.append(tmp_path / "runs/g/checkpoints")
    try:
        with pytest.raises(SystemExit):
            main(arguments)
    finally:
        watched.clear()
    # What may be cleared is found in the manifests, which are short and have no hash.
    del opened["manifest.json"], files["manifest.json"]
    assert {name: opened[name] for name in files} == dict.fromkeys(files, 1)
    assert hashed == Counter(files.values())
