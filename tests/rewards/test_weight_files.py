"""Weight files as they are published: TorchScript archives, tensors that the network does not use, tensors that it lacks."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.config.components import build, describe
from rewards._models.torchscript import is_torchscript, read_torchscript
from rewards._models.weights import check_weights, read_weights
from tests.oracles.published_pixels import PROMPTS
from tests.oracles.published_weights import (
    bert_tokenizer,
    clip_model,
    head_state,
    image_reward_state,
    openai_archive,
    openai_clip,
    published,
    traced,
)
from tests.oracles.tiny_rewards import some_images

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


class Tree(nn.Module):
    """Everything that an archive's tree may hold beside tensors: nested modules, lists, words, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2))
        self.alone = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("places", torch.arange(4))
        self.sizes, self.word, self.nothing = [1, 2], "word", None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x) * self.alone + self.places.sum()  # type: ignore[operator]
        return found + len(self.sizes)


class Scripted(nn.Module):
    """An archive whose code would have to be run: it has its own way to restore itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]  # type: ignore[assignment]
        self.training = state[1]


@pytest.mark.parametrize("how", ["traced", "scripted"])
def test_an_archive_s_tensors_are_those_that_torch_jit_loads(how: str, tmp_path: Path) -> None:
    made = torch.jit.trace(Tree(), torch.rand(1, 3)) if how == "traced" else torch.jit.script(Tree())
    made.save(str(tmp_path / "tree.pt"))
    assert is_torchscript(tmp_path / "tree.pt")
    expected = torch.jit.load(str(tmp_path / "tree.pt")).state_dict()
    found = read_weights(tmp_path / "tree.pt")
    assert len(expected) == 6
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_files_that_torch_saved_are_not_archives(tmp_path: Path) -> None:
    assert not is_torchscript(openai_clip())
    assert not is_torchscript(tmp_path)
    assert not is_torchscript("openai")


def test_an_archive_that_must_be_run_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    torch.jit.script(Scripted()).save(str(folder / "own.pt"))
    with pytest.raises(ValueError, match=r"own\.pt is a TorchScript archive, and not of tensors alone") as refused:
        read_weights(folder / "own.pt")
    line = str(refused.value).partition("give that: python ")[2]
    subprocess.run(f"{sys.executable} {line}", shell=True, check=True)
    assert torch.equal(read_weights(folder / "own-state.pt")["weight"], torch.ones(2))


def test_what_an_archive_brings_along_is_not_run(tmp_path: Path) -> None:
    """A class of the interpreter in the tree is refused, as in any other file."""
    torch.jit.script(Tree()).save(str(tmp_path / "tree.pt"))
    with zipfile.ZipFile(tmp_path / "tree.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            harm = b"cos\nsystem\n(S'exit 3'\ntR."
            bad.writestr(name, harm if name.endswith("/data.pkl") else good.read(name))
    with pytest.raises(ValueError, match="is a TorchScript archive, and not of tensors alone"):
        read_torchscript(tmp_path / "bad.pt")


def test_a_truncated_archive_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "ViT-L-14.pt").write_bytes(openai_archive().read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is truncated"):
        check_weights(tmp_path / "ViT-L-14.pt")


def test_clip_score_reads_openai_s_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With open_clip's own sizes, so that its embedding of a picture is the oracle."""
    import open_clip

    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    small: dict[str, Any] = {**config, "vision_cfg": {**config["vision_cfg"], "layers": 1}}
    small["text_cfg"] = {**config["text_cfg"], "layers": 1, "context_length": 77}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {**small, "quick_gelu": "quickgelu" in name})
    model = open_clip.model.CLIP(**small).eval()
    traced(model, 224, 77).save(str(tmp_path / "ViT-B-32.pt"))
    component = {"component": "clip_score", "model": "ViT-B-32-quickgelu", "weights": str(tmp_path / "ViT-B-32.pt")}
    describe(component, "reward")
    images = some_images(5, 224, 224)
    with torch.no_grad():
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        image = model.encode_image((images - mean) / std, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(PROMPTS), normalize=True)
    found = build(component, "reward")(images, PROMPTS)
    torch.testing.assert_close(found, (image * text).sum(1), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"OpenAI's networks have QuickGELU: .*'ViT-B-32' .* Give 'ViT-B-32-quickgelu'"
    ):
        build({**component, "model": "ViT-B-32"}, "reward")


def test_image_reward_uses_what_it_knows_and_says_what_else_there_is(tmp_path: Path) -> None:
    """The published code loads with strict=False; what is missing would be random numbers, and is refused."""
    state = image_reward_state()
    torch.save({**state, "blip.other": torch.zeros(1), "visual.more": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    component = {"component": "image_reward", "tokenizer": str(bert_tokenizer())}
    with pytest.warns(UserWarning, match=r"has 2 tensors that ImageReward does not use.*: blip\.other, visual\.more\."):
        found = build({**component, "weights": str(tmp_path / "ImageReward.pt")}, "reward")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = build({"component": "image_reward", **published("image_reward")}, "reward")
    images = some_images(5)
    assert torch.equal(found(images, PROMPTS), expected(images, PROMPTS))


@pytest.mark.parametrize("name", ["hps_v2", "aesthetic"])
@pytest.mark.parametrize("what", ["missing", "unknown"])
def test_where_the_published_code_is_strict_so_are_we(name: str, what: str, tmp_path: Path) -> None:
    state = clip_model("ViT-H-14").state_dict() if name == "hps_v2" else head_state(12)
    key = next(iter(state)) if name == "hps_v2" else "layers.6.bias"
    state = {k: v for k, v in state.items() if k != key} if what == "missing" else {**state, "other": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth (does not hold .*: 1 {what} \(first: |.*it has no )"):
        build({"component": name, **published(name), "weights": str(tmp_path / "weights.pth")}, "reward")
