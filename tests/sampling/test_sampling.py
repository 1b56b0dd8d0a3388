"""Names of sampled pictures: in any script, on any file system, and never one that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rtb.files.pictures import write_images
from diffusion_rtb.sampling.images import draw_batches, draw_images, image_paths, slug
from tests.oracles.pixel import PixelPrior


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("A Cat, emoji!", "a-cat-emoji"),
        ("猫と犬", "猫と犬"),
        ("صورة قطة", "صورة-قطة"),
        ("कुत्ता", "कुत्ता"),
        ("Ein Ba\u0308r", "ein-bär"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 100, "x" * 40),
    ],
)
def test_letters_of_any_script_are_kept(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_prompts_without_letters_differ() -> None:
    names = {slug(prompt) for prompt in ("", " ", "😀", "😃", "!?", "\x1b[")}
    assert len(names) == 6


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_every_name_is_one_that_file_systems_take(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(f"000000-{name}-0.png".encode()) <= 255
    assert not re.search(r'[\x00-\x1f/\\:*?"<>|\s]', name)


def test_what_is_there_is_refused_or_replaced(tmp_path: Path) -> None:
    prompts = ["😀", "猫"]
    paths = image_paths(prompts, 2, tmp_path)
    assert len(set(paths)) == 4
    prior = PixelPrior()
    write_images(draw_batches(prior, prompts, 2, batch=3), paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    with pytest.raises(ValueError, match="there already \\(2 of 2 files\\)"):
        image_paths(prompts[:1], 2, tmp_path)
    assert image_paths(prompts, 2, tmp_path, overwrite=True) == paths


def test_batches_are_the_whole() -> None:
    prior = PixelPrior()
    batches = list(draw_batches(prior, ["a", "b", "c"], 3, seed=1, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert torch.equal(torch.cat(batches), draw_images(prior, ["a", "b", "c"], 3, seed=1, batch=4))
