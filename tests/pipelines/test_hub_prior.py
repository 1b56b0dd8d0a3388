"""Priors of a model hub whose repository has other files than the plain safetensors ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.loopback_hub import loopback_hub
from tests.oracles.tiny import save_tiny, tiny_stable_diffusion


def load(**settings: str) -> StableDiffusion:
    return StableDiffusion("someone/tiny", steps=4, device="cpu", **settings)  # type: ignore[arg-type]


def test_fp16_alone_and_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_stable_diffusion().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    save_tiny(tmp_path / "whole")
    both = Path(shutil.copytree(tmp_path / "half", tmp_path / "both"))
    shutil.copytree(tmp_path / "whole", both, dirs_exist_ok=True)
    whole, half = (
        StableDiffusion(str(both), steps=4, device="cpu", variant=variant).features(["a cat"])
        for variant in (None, "fp16")
    )
    assert not torch.equal(whole, half)
    with loopback_hub(tmp_path / "half", tmp_path / "cache 1", monkeypatch):
        assert torch.equal(load().features(["a cat"]), half)
    with loopback_hub(both, tmp_path / "cache 2", monkeypatch) as asked:
        assert torch.equal(load(revision="v1").features(["a cat"]), whole)
        assert not any("fp16" in path for path in asked)
        assert any("/v1" in path for path in asked)
    with loopback_hub(both, tmp_path / "cache 3", monkeypatch):
        assert torch.equal(load(variant="fp16").features(["a cat"]), half)


def test_pickles_alone_are_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "old")
    for file in list((tmp_path / "old").rglob("*.safetensors")):
        file.rename(file.with_suffix(".bin"))
    with loopback_hub(tmp_path / "old", tmp_path / "cache", monkeypatch) as asked:
        with pytest.raises(
            OSError, match=r"'someone/tiny' .*neither plain nor fp16 weights in safetensors.*save_pretrained"
        ) as caught:
            load().load_weights()
        assert "\n" not in str(caught.value)
        assert not any(path.endswith(".bin") for path in asked)


def test_what_was_fetched_once_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    with loopback_hub(tmp_path / "model", tmp_path / "cache", monkeypatch):
        fetched = load().features(["a cat"])
        for place in ("constants.ENDPOINT", "hf_api.api.endpoint"):
            monkeypatch.setattr(f"huggingface_hub.{place}", "http://127.0.0.1:9")  # nobody listens there
        assert torch.equal(load().features(["a cat"]), fetched)
        with pytest.raises(OSError, match=r"path='someone/other' could not be fetched.*Give a local folder instead"):
            StableDiffusion("someone/other", steps=4, device="cpu").load_weights()
