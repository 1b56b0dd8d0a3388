"""What of a prompt the text encoder does not read is said before the weights load."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny

LONG = "a cat on a mat " * 6 + "with a hat"
"""The tiny tokenizer spells, and these letters just fit into 75 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("long") / "model")


def test_the_part_that_is_not_read_is_named(folder: Path) -> None:
    prior = StableDiffusion(str(folder), steps=2, device="cpu")
    letters = len(LONG.replace(" ", ""))
    with pytest.warns(
        UserWarning, match="1 of 2 prompts are longer than the 77 tokens that text_encoder reads"
    ) as said:
        prior.read_prompts(["a cat", LONG + " and a very long coat"], [{}, {}], folder)
    unread = (LONG + " and a very long coat").replace(" ", "")[75:]
    assert letters <= 75
    assert unread in str(said[0].message).replace(" ", "")
    cut, whole = (prior.arguments([text])["prompt_embeds"] for text in (LONG + " and a very long coat", LONG))
    assert not torch.equal(cut, whole), "what is within the limit is read"


def test_what_fits_is_passed_over_in_silence(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StableDiffusion(str(folder), steps=2, device="cpu").read_prompts(["a cat", LONG], [{}, {}], folder)
