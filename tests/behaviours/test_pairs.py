"""Pairs of pictures from a folder: encoded by the autoencoder, learned from by their order, and refused where not whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_rtb.behaviours.pairs import Pairs
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.training.assemble import assemble, check_run
from tests.oracles.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

COLUMNS = ("image_w", "image_l", "prompt")
ROWS = [("a1.png", "a0.png", "a"), ("b1.png", "b0.png", "b"), ("a2.png", "a0.png", "a")]


def write(folder: Path, rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def picture(path: Path, size: int, level: float) -> None:
    noise = 0.1 * torch.rand(size, size, 3, generator=torch.Generator().manual_seed(len(path.name) + ord(path.name[1])))
    Image.fromarray(((level + noise) * 255).to(torch.uint8).numpy()).save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "model"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "compared"
    place.mkdir()
    for name in ("a0", "a1", "a2", "b0", "b1"):
        picture(place / f"{name}.png", SIZE, 0.2 if name.endswith("0") else 0.8)
    write(place, ROWS)
    return place


SIZE = 64


def config(model: Path, out: Path, folder: Path, **sections: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "pairs",
        "out": str(out / "runs"),
        "prior": {"component": "stable_diffusion", "path": str(model), "steps": 3, "device": "cpu"},
        "reward": {"component": "brightness"},
        "beta": 1.0,
        "objective": {"component": "diffusion_dpo", "slope": 0.05, "own": False},
        "prompts": {"list": ["a", "b"]},
        "behaviours": [{"component": "pairs", "share": 0.5, "folder": str(folder)}],
        "train": {"iterations": 1, "prompts_per_iteration": 2, "group": 4, "micro_batch": 4, "grid_every": 0},
    }
    return RunConfig.model_validate(data | sections)


def test_the_better_picture_is_learned(model: Path, tmp_path: Path, folder: Path) -> None:
    trainer = assemble(config(model, tmp_path, folder))
    source, count = trainer.sources["pairs"]
    batch = source.draw(trainer.sampler, [0, 1], count, 0, 1.0)
    assert batch.reward.tolist() == [1.0, 0.0] * 2
    assert [trainer.sampler.prompts[row] for row in batch.prompt] == ["a", "a", "b", "b"]
    vae = trainer.prior.pipe.vae
    with Image.open(folder / "b1.png") as image:
        levels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
    with torch.no_grad():
        wanted = vae.encode(levels[None] / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(batch.trajectory.x_0[2:3], wanted, atol=1e-5, rtol=1e-5)
    again = [source.draw(trainer.sampler, [0], count, i, 1.0).trajectory.x_0 for i in range(8)]
    assert len({tuple(x[0].flatten().tolist()) for x in again}) == 2, "both pairs of the prompt come"
    update = trainer.updates.gradient({"posterior": trainer.sampler.draw([0, 0], [0, 1]), "pairs": batch}, 1.0, 0, 0)
    with_own = [p.grad.clone() for p in trainer.prior.parameters().values() if p.grad is not None]
    trainer.updates.gradient({"posterior": trainer.sampler.draw([1, 1], [8, 9]), "pairs": batch}, 1.0, 0, 0)
    alone = [p.grad for p in trainer.prior.parameters().values() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(with_own, alone, strict=True)), (
        "own samples are left alone"
    )
    assert any(bool(gradient.any()) for gradient in alone)
    assert update.loss is not None
    trainer.fit()


def test_lines_of_json_are_read_too(folder: Path) -> None:
    lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in ROWS]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    found = Pairs(0.5, str(folder), "pairs.jsonl").pairs
    assert found == Pairs(0.5, str(folder)).pairs
    assert [(pair.better.name, pair.worse.name, pair.prompt) for pair in found] == ROWS


def broken(folder: Path, how: str) -> None:
    if how == "file":
        (folder / "metadata.csv").unlink()
    if how == "picture":
        (folder / "b0.png").unlink()
    if how == "size":
        picture(folder / "b0.png", SIZE + 8, 0.5)
    if how == "damaged":
        (folder / "b0.png").write_bytes(b"no picture")
    if how == "column":
        write(folder, ROWS, ("better", "image_l", "prompt"))
    if how == "same":
        write(folder, [("a1.png", "a1.png", "a")])
    if how == "empty":
        write(folder, [])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("file", "there is no file .*metadata.csv; it has the columns image_w, image_l, prompt"),
        ("picture", "metadata.csv, line 3: there is no picture .*b0.png"),
        ("size", "of 2 sizes .*64 x 64.*b0.png 72 x 72.*resize or crop"),
        ("damaged", "b0.png cannot be read as an image"),
        ("column", "line 2: no image_w; it has better, image_l, prompt"),
        ("same", "line 2: image_w and image_l are the same picture"),
        ("empty", "metadata.csv has no rows"),
    ],
)
def test_pairs_that_are_not_whole_are_refused(folder: Path, how: str, message: str) -> None:
    broken(folder, how)
    with pytest.raises(ValueError, match=message):
        Pairs(0.5, str(folder))


GAUSSIAN = {"component": "gaussian", "mean": [0.0, 0.0], "steps": 4}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"component": "rtb"}}, "reads rewards as numbers.*does without: objective: diffusion_dpo"),
        ({"objective": {"component": "diffusion_dpo", "labels": "soft"}}, "reads rewards as numbers"),
        ({"prior": GAUSSIAN}, "prior 'gaussian' has no method latents_of"),
        ({"prompts": {"list": ["a", "c"]}}, "1 of the run's 2 prompts have no pair in .*the first is 'c'"),
        ({"behaviours": []}, "own: false leaves the posterior's own samples alone, and there are no others"),
        ({"train": {"prompts_per_iteration": 2, "group": 8, "micro_batch": 8}}, "is 4: set it to 0.25"),
    ],
)
def test_runs_that_pairs_do_not_fit_are_refused(
    model: Path, folder: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(config(model, tmp_path, folder, **sections), tmp_path)


def test_pictures_of_another_size_than_the_prior_s_are_refused(model: Path, tmp_path: Path, folder: Path) -> None:
    for path in folder.glob("*.png"):
        picture(path, 2 * SIZE, 0.5)
    with pytest.raises(ValueError, match=r"The pictures are 128 x 128 pixels, the prior draws 64 x 64"):
        assemble(config(model, tmp_path, folder)).step()
