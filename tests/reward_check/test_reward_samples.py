"""What rewards are checked on: pictures made here, a folder, draws of a prior, vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_rtb.reward_check.samples import choose_samples, folder_samples, standard_samples, vector_samples
from tests.oracles.tiny import save_tiny
from tests.oracles.tiny_rewards import some_images


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_notes_are_read_as_windows_writes_them(tmp_path: Path, encoding: str) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("eine Bärin\n", encoding=encoding)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b\u2028"}', encoding=encoding)
    assert folder_samples(tmp_path).prompts == ["eine Bärin", "b\u2028"]


def test_the_standard_pictures_are_the_same_at_every_call_and_all_different() -> None:
    samples, again = standard_samples(32, 64), standard_samples(32, 64)
    assert samples.images.shape == (32, 3, 64, 64)
    assert torch.equal(samples.images, again.images)
    assert samples.prompts == again.prompts
    assert len({image.numpy().tobytes() for image in samples.images}) == 32
    assert torch.equal((samples.images * 255).round() / 255, samples.images), "8-bit levels"
    assert torch.equal(standard_samples(8, 64).images, samples.images[:8])
    assert samples.images.flatten(1).mean(1).std() > 0.15, "dark and light"
    assert {'a white sign that says "OPEN"', "a crimson circle on a white background"} <= set(samples.prompts)


def save(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        x = some_images(1, height, width, seed)[0]
        Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()).save(folder / name)


def test_a_folder_with_its_prompts(tmp_path: Path) -> None:
    save(tmp_path, {"a_red-cat.png": (20, 12), "b.png": (20, 12), "c.webp": (20, 12), "d.bmp": (20, 12)})
    (tmp_path / "b.txt").write_text("a blue dog\n")
    (tmp_path / "notes.md").write_text("no picture")
    lines = [{"file_name": "c.webp", "text": "a green bird"}, {"file_name": "b.png", "text": "a yellow dog"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    samples = folder_samples(tmp_path)
    assert samples.prompts == ["a red cat", "a yellow dog", "a green bird", "d"]
    assert samples.images.shape == (4, 3, 12, 20)
    expected = np.array(Image.open(tmp_path / "b.png")) / np.float32(255)
    np.testing.assert_array_equal(samples.images[1].permute(1, 2, 0), expected)
    (tmp_path / "metadata.jsonl").unlink()
    assert folder_samples(tmp_path, limit=2).prompts == ["a red cat", "a blue dog"]
    assert choose_samples(images=tmp_path, prompts=["x", "y"], count=3).prompts == ["x", "y", "x"]


def test_pictures_of_different_sizes_become_squares_when_asked(tmp_path: Path) -> None:
    save(tmp_path, {"a.png": (20, 12), "b.png": (16, 30)})
    with pytest.raises(ValueError, match=r"have 2 sizes \(a\.png 20 x 12, b\.png 16 x 30, \.\.\.\): give --size"):
        folder_samples(tmp_path)
    samples = choose_samples(images=tmp_path, side=8)
    centre = Image.open(tmp_path / "a.png").crop((4, 0, 16, 12)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(samples.images[0].permute(1, 2, 0), np.array(centre) / np.float32(255))


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        folder_samples(tmp_path / "nowhere")
    save(tmp_path, {"a.png": (8, 8)})
    with pytest.raises(ValueError, match=r"has 1 pictures .*needs at least 2"):
        folder_samples(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as a picture"):
        folder_samples(tmp_path)
    save(tmp_path, {"b.png": (8, 8)})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: write .*KeyError\('text'\)"):
        folder_samples(tmp_path)


CONFIG = """
prior: {component: stable_diffusion, path: tiny, steps: 2}
reward: {component: jpeg}
beta: 1.0
prompts: {list: [a cat, a dog, a bird]}
train: {prompts_per_iteration: 1, group: 2, micro_batch: 2}
"""


def test_draws_of_a_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("tiny")
    Path("small.yaml").write_text(CONFIG)
    samples = choose_samples(prior=Path("small.yaml"), count=5)
    assert samples.images.shape == (6, 3, 64, 64)
    assert samples.prompts == ["a cat"] * 2 + ["a dog"] * 2 + ["a bird"] * 2
    assert samples.images.std(0).mean() > 0
    own = choose_samples(prior=Path("small.yaml"), prompts=["a cat"], count=2)
    torch.testing.assert_close(own.images, samples.images[:2], rtol=0, atol=1e-4)


def test_vectors() -> None:
    samples = vector_samples(3, 4000)
    assert samples.images.shape == (4000, 3)
    assert samples.images.std() == pytest.approx(3.0, rel=0.03)
    assert torch.equal(samples.images, choose_samples(dim=3, count=4000).images)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": Path("a"), "dim": 2}, "--images and --dim both say"),
        ({"dim": 2, "side": 64}, "--size is 64, but --dim decides"),
        ({"prior": Path("a.yaml"), "side": 64}, "--size is 64, but --prior decides"),
        ({"count": 1}, "at least 2 pictures"),
        ({"side": 8}, "at least 16 pixels; got 32 of 8"),
        ({"dim": 0}, "at least 1 dimension; got 32 of 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_samples(**arguments)
