"""Real images beside the samples: read as Pillow reads them or refused by name, and torch-fidelity's own FID and KID."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.evaluation.features import features_of
from diffusion_rtb.evaluation.metrics._clouds import Cloud
from diffusion_rtb.evaluation.metrics.frechet import frechet_distance
from diffusion_rtb.evaluation.metrics.kid import KID
from diffusion_rtb.files.real_images import image_files, read_image, read_images
from diffusion_rtb.training.assemble import assemble
from tests.evaluation.test_evaluation import pixel_run


def pictures(folder: Path, count: int, side: int = 8, seed: int = 0, top: int = 256) -> Tensor:
    """Noise as PNG files; their levels."""
    folder.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, top, (count, side, side, 3), dtype=np.uint8)
    for i, picture in enumerate(levels):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return torch.from_numpy(levels).permute(0, 3, 1, 2)


def test_images_are_read_level_by_level(tmp_path: Path) -> None:
    levels = pictures(tmp_path / "real", 5)
    (tmp_path / "real" / "notes.txt").write_text("no image")
    paths = image_files(tmp_path / "real")
    assert [path.name for path in paths] == [f"{i:03}.png" for i in range(5)]
    found = torch.cat([images for _, images in read_images(paths, 2)])
    assert torch.equal((found * 255).round().to(torch.uint8), levels)
    grey = Image.fromarray(levels[0, 0].numpy())
    grey.save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), (levels[0, :1].float() / 255).expand(3, -1, -1))


def mixed(folder: Path) -> None:
    pictures(folder, 3)
    Image.new("RGB", (9, 7)).save(folder / "odd.png")


def damaged(folder: Path) -> None:
    pictures(folder, 1)
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:100])


def single(folder: Path, mode: str | None) -> None:
    folder.mkdir()
    if mode is None:
        (folder / "a.png").write_text("x")
    else:
        Image.new(mode, (2, 2)).save(folder / "a.png")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "There is no folder"),
        (lambda folder: folder.mkdir(), "has no images: none of its files ends in"),
        (mixed, r"are of 2 sizes \(000.png 8 x 8, odd.png 9 x 7\): resize or crop them to one"),
        (damaged, "000.png is damaged"),
        (partial(single, mode=None), "a.png cannot be read as an image"),
        (partial(single, mode="RGBA"), "has transparent parts"),
        (partial(single, mode="I;16"), "of mode I;16"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "real")
    with pytest.raises(ValueError, match=message):
        list(read_images(image_files(tmp_path / "real"), 4))


def test_a_run_is_held_against_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pixel_run(tmp_path)
    assemble(config).fit()
    pictures(tmp_path / "real", 7, side=4)
    asked = [
        f"eval.reference={tmp_path / 'real'}",
        "eval.embedder.component=tests.oracles.pixel:Signs",
        "eval.metrics=[reward, frechet, {component: prdc, k: 2}, mmd]",
        "eval.labeller=null",
    ]
    found = evaluate_run(tmp_path / "pixel", asked)
    for name in ("frechet", "prdc", "mmd"):
        assert set(found["overall"][name]["to_reference"]) == {"prior", "reweighted_prior", "posterior"}
        assert found["overall"][name]["samples"]["reference"] == 7
        assert found["per_prompt"][0][name]["to_reference"] is None
    assert "Fréchet" in capsys.readouterr().out
    mixed(tmp_path / "real")
    with pytest.raises(ValueError, match=r"are of 3 sizes \(000.png 8 x 8, 003.png 4 x 4, odd.png 9 x 7\)"):
        evaluate_run(tmp_path / "pixel", asked)
    with pytest.raises(ValueError, match="needs an embedder"):
        EvalConfig.model_validate({"reference": "real"})


def test_fid_and_kid_are_torch_fidelity_s_own(tmp_path: Path) -> None:
    """Its network with random weights, at its first layer, where a test has the time for it; its own metrics of two folders."""
    torch_fidelity = pytest.importorskip("torch_fidelity", reason="extra fid")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:
            """Keep the random ones."""

    torch.save({}, tmp_path / "none.pth")
    with torch.device("meta"):
        shapes = Bare("x", ["64"], feature_extractor_weights_path=str(tmp_path / "none.pth")).state_dict()
    random = {
        name: torch.rand(like.shape).to(like.dtype) / max(like.shape[1:].numel(), 1) for name, like in shapes.items()
    }
    weights = tmp_path / "inception.pth"
    torch.save(random, weights)
    pictures(tmp_path / "one", 10)
    pictures(tmp_path / "two", 10, seed=1, top=100)
    embedder = build({"component": "inception", "layer": "64", "weights": str(weights), "batch": 4}, "embedder")
    sides = []
    for name in ("one", "two"):
        images = torch.cat([images for _, images in read_images(image_files(tmp_path / name), 10)])
        sides.append(features_of(embedder, images, [name] * 10))
    published = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "one"), input2=str(tmp_path / "two"), cuda=False, fid=True, kid=True, verbose=False,
        feature_extractor_weights_path=str(weights), feature_layer_fid="64", feature_layer_kid="64",
        kid_subset_size=10, kid_subsets=2, cache=False, batch_size=10, save_cpu_ram=True,
    )  # fmt: skip
    ours = frechet_distance(sides[0], sides[1])
    assert ours == pytest.approx(published["frechet_inception_distance"], rel=1e-3)
    clouds = {"a": Cloud.of(sides[0]), "b": Cloud.of(sides[1])}
    kid = _kid(clouds)
    assert kid == pytest.approx(published["kernel_inception_distance_mean"], rel=1e-3)
    broken = torch.rand(2, 3, 8, 8)
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Inception gave NaN or infinite features for b"):
        features_of(embedder, broken, ["a", "b"])


def _kid(clouds: dict[str, Cloud]) -> float:
    from diffusion_rtb.evaluation.metrics._pairs import pair_means

    kernel = KID()._kernel
    within = [float(pair_means(kernel, cloud, cloud)) for cloud in clouds.values()]
    return sum(within) - 2 * float(pair_means(kernel, clouds["a"], clouds["b"]))


def test_torch_fidelity_is_asked_for_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as Python itself marks what cannot be imported
    with pytest.raises(ValueError, match=r"not installed: pip install 'diffusion-rtb\[fid\]'"):
        describe({"component": "inception"}, "embedder")
