"""The bundled prior `fashion`: small, stock, its samples read as clothes of many kinds; and the command that rebuilds it."""

from __future__ import annotations

import gzip
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from torch import Tensor

from diffusion_rtb.config.components import build
from pipelines import fashion
from pipelines.fashion.build import classifier, data, prior
from pipelines.fashion.build.__main__ import main
from pipelines.unconditional import Unconditional
from rewards.classifier import Classifier

COUNT, STEPS = 48, 6


@pytest.fixture(scope="module")
def samples() -> Tensor:
    """(count, 3, 32, 32) in [0, 1] by stock diffusers, loaded with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = DDPMPipeline.from_pretrained(str(fashion.path()), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    images = pipe(
        batch_size=COUNT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def test_the_folder_is_small_licensed_and_holds_no_pickle() -> None:
    files = [file for file in fashion.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
    assert "LICENSE-fashion-mnist.txt" in {file.name for file in files}
    assert "_name_or_path" not in (fashion.path() / "unet" / "config.json").read_text()


def test_samples_are_clothes_of_many_kinds(samples: Tensor) -> None:
    judge = Classifier("bag", model="fashion-classifier")
    assert tuple(judge.labels) == fashion.CLASSES
    assert set(fashion.TOPS) < set(fashion.CLASSES)
    log_probs = judge.log_probs(samples)
    shares = log_probs.exp().mean(0)
    entropy = float(-(shares * shares.log()).sum())
    assert entropy > 1.9  # of log 10 = 2.30: no class is lost
    own = float(-(log_probs.exp() * log_probs).sum(1).mean())
    assert own < 0.9  # a picture without a class has 2.30
    border = samples[:, :, [0, 1, 30, 31]]
    assert float(border.mean()) < 0.05  # as in the data, which are padded


def test_its_family_takes_it_by_name_and_decodes_grey() -> None:
    found = build({"component": "unconditional", "path": "fashion", "steps": 4, "device": "cpu"}, "prior")
    assert isinstance(found, Unconditional)
    assert found.dims == (1, 32, 32)
    assert "'pipelines/fashion/weights'" in found.snippet()
    x_0 = torch.randn(2, 1, 32, 32)
    images = found.decode(x_0)
    torch.testing.assert_close(images, (x_0 / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1))


def written(folder: Path, half: str, count: int) -> None:
    """The two files of one half, with `count` pictures that are all of one grey each."""
    labels = np.arange(count, dtype=np.uint8) % 10
    pixels = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)).astype(np.uint8)
    for name, array in ((f"{half}-images-idx3-ubyte.gz", pixels), (f"{half}-labels-idx1-ubyte.gz", labels)):
        sizes = np.array([0x800 + array.ndim, *array.shape], ">u4")
        (folder / name).write_bytes(gzip.compress(sizes.tobytes() + array.tobytes()))


def test_the_data_are_read_scaled_and_padded(tmp_path: Path) -> None:
    written(tmp_path, "train", 20)
    found = data.load("train", tmp_path)
    assert found.labels.tolist() == [k % 10 for k in range(20)]
    inside = torch.arange(10) * 20 / 127.5 - 1
    torch.testing.assert_close(found.images[:10, 0, 2:30, 2:30], inside[:, None, None].expand(10, 28, 28))
    assert bool((found.images[:, :, :2] == -1).all())
    assert len(found.of((3, 4))) == 4


def test_data_that_are_not_there_or_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images.*apt-get install dataset-fashion-mnist.*--data FOLDER"):
        data.load("train", tmp_path)
    written(tmp_path, "train", 20)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(ValueError, match="not an IDX file of 3 dims"):
        data.load("train", tmp_path)


def test_the_rebuild_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, work, out = tmp_path / "data", tmp_path / "work", tmp_path / "out"
    source.mkdir()
    written(source, "train", 20)
    for module in (prior, classifier):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(classifier, "SIZE", 32)
    common = ["--work", str(work), "--data", str(source), "--threads", str(torch.get_num_threads())]
    folders = ["--prior", str(out / "prior"), "--classifier", str(out / "classifier")]
    with caplog.at_level(logging.INFO):
        for minutes in ("1e-9", "1e-9", "1e9"):  # one step; none more; interrupted below
            if minutes == "1e9":
                monkeypatch.setattr("pipelines.emoji.build.learning.training.Training.step", interrupted)
            for stage in ("prior", "classifier"):
                run = [*common, *folders, "--stage", stage, "--minutes", minutes]
                if minutes == "1e9":
                    with pytest.raises(KeyboardInterrupt):
                        main(run)
                else:
                    main(run)
    assert sum("resumes at step 1," in message for message in caplog.messages) == 4
    main([*common, *folders, "--stage", "export"])
    pipe = DDPMPipeline.from_pretrained(str(out / "prior"))
    trained, steps = prior.pipeline(work)
    assert steps == 1
    for name, tensor in trained.unet.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[name], tensor.half().float())
    assert (out / "classifier" / "classifier.json").is_file()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
