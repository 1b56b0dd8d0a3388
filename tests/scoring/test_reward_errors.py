"""Bad arguments of rewards are refused before any weights load; messages name the value and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_rtb.config.components import build, describe
from rewards._models.weights import check_weights, fill, read_weights
from tests.oracles.tiny_rewards import CLASSES, MODEL, tiny_clip

ZERO_SHOT: dict[str, Any] = {"component": "classifier", "classes": CLASSES, "target": 0}
TRAINED: dict[str, Any] = {"component": "classifier", "model": "torchvision:squeezenet1_1", "target": 0}


@pytest.mark.parametrize(
    "component, error, message",
    [
        ({"component": "clip_score", "scale": 0.0}, ValueError, r"scale is 0\.0: it must be finite and not 0"),
        ({"component": "clip_score", "batch": 0}, ValueError, "batch is 0: at least 1"),
        (
            {"component": "clip_score", "model": "emoji-clop"},
            ValueError,
            "no architecture 'emoji-clop'.*mean 'emoji-clip'",
        ),
        ({"component": "clip_score", "model": "ViT-B-33"}, ValueError, "no architecture 'ViT-B-33'.*mean 'ViT-B-32'"),
        ({"component": "clip_score", "model": "ViT-B-32"}, ValueError, "'ViT-B-32' needs `weights`.*'openai'"),
        ({"component": "clip_score", "model": "ViT-B-32", "weights": "openia"}, ValueError, "'openia'.*mean 'openai'"),
        (
            {"component": "clip_score", "model": "ViT-B-32", "weights": "no/such.pt"},
            FileNotFoundError,
            "file at no/such.pt",
        ),
        ({"component": "clip_score", "model": "hf-hub:a/b", "weights": "x.pt"}, ValueError, "leave out `weights`"),
        (
            {"component": "clip_score", "model": "local-dir:/no/folder"},
            FileNotFoundError,
            "There is no /no/folder/open_clip",
        ),
        ({"component": "clip_score", "modle": "emoji-clip"}, ValueError, "no argument 'modle'.*mean 'model'"),
        ({"component": "jpeg", "quality": 100}, ValueError, "quality is 100: JPEG encoders take 1 to 95"),
        ({"component": "jpeg", "sign": "expand"}, ValueError, "expand.*compress"),
        ({"component": "jpeg", "unit": "bits"}, ValueError, "bits.*bits_per_pixel"),
        ({**ZERO_SHOT, "classes": None}, ValueError, "classifies by prompts: give `classes`"),
        ({**ZERO_SHOT, "classes": ["one"]}, ValueError, "at least two different"),
        ({**ZERO_SHOT, "classes": ["one", "one"]}, ValueError, "at least two different"),
        ({**ZERO_SHOT, "target": "a cat emojo"}, ValueError, "'a cat emojo' is not among.*mean 'a cat emoji'"),
        ({**ZERO_SHOT, "target": 3}, ValueError, r"target is 3: there are 3 classes, so it must be in \[0, 2\]"),
        ({**ZERO_SHOT, "target": []}, ValueError, "target is empty"),
        ({**ZERO_SHOT, "temperature": 0.0}, ValueError, r"temperature is 0\.0: it must be positive"),
        ({**ZERO_SHOT, "size": 64}, ValueError, "size is 64: it is for torchvision and timm"),
        (TRAINED, ValueError, "needs `weights`"),
        ({**TRAINED, "weights": "none.pth"}, FileNotFoundError, r"No weights file at none\.pth"),
        (
            {**TRAINED, "model": "timm:resnet19", "weights": "x.pth"},
            ValueError,
            "timm has no classifier 'resnet19'.*mean 'resnet1",
        ),
        ({**TRAINED, "weights": "x.pth", "target": "tabbby"}, ValueError, "'tabbby' is not among.*mean 'tabby'"),
        (
            {**TRAINED, "model": "timm:test_vit", "weights": "x.pth", "target": 5000},
            ValueError,
            r"target is 5000: there are 1000",
        ),
        ({"component": "weighted_sum", "rewards": []}, ValueError, "rewards is empty"),
        ({"component": "weighted_sum", "rewards": [{"weight": 1}]}, ValueError, "written `{component"),
        (
            {"component": "weighted_sum", "rewards": [{"component": "jpeg", "weight": "much"}]},
            ValueError,
            "weight of reward 'jpeg' is 'much': it must be a finite number",
        ),
        (
            {"component": "weighted_sum", "rewards": [{"component": "jpeg"}, {"component": "jpeg", "quality": 10}]},
            ValueError,
            "Two rewards are called 'jpeg': add `name",
        ),
        (
            {"component": "weighted_sum", "rewards": [{"component": "jpeg", "qualty": 10}]},
            ValueError,
            "no argument 'qualty'.*mean 'quality'",
        ),
    ],
    ids=str,
)
def test_bad_arguments(component: dict[str, Any], error: type[Exception], message: str) -> None:
    if component.get("component") == "classifier" and "model" not in component:
        component = {**component, "model": str(tiny_clip())}
    with pytest.raises(error, match=message):
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def truncate(file: Path, share: float = 0.7) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def test_a_truncated_open_clip_folder(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip(), tmp_path / "model"))
    truncate(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors is truncated.*fetch it again"):
        describe({"component": "clip_score", "model": str(folder)}, "reward")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: it needs open_clip_model\.safetensors"):
        describe({"component": "clip_score", "model": str(folder)}, "reward")


def test_open_clip_weights_of_another_architecture(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip(), tmp_path / "model"))
    config = {"model_cfg": {**MODEL, "embed_dim": 24}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model .*/model': 2 of another shape \(first: text_projection.*not of one model"
    ):
        build({"component": "clip_score", "model": str(folder)}, "reward")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'model_cfg'"):
        build({"component": "clip_score", "model": str(folder)}, "reward")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_weights_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    state = {"weight": torch.zeros(4000)}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    assert check_weights(file) == file
    truncate(file)
    with pytest.raises(ValueError, match="is truncated"):
        describe({**TRAINED, "weights": str(file)}, "reward")


class Harmful:
    """What an attacker puts into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", [Harmful(), torch.nn.Linear(2, 2), [1, 2], {}])
def test_only_state_dicts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights\.pth (is damaged, or holds more than tensors|holds a .* not a state dict)"
    ):
        read_weights("weights.pth")
    assert not Path("executed").exists()


def test_a_file_that_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ValueError, match=r"ends in '\.onnx'; weights are read from \.safetensors"):
        check_weights(tmp_path / "weights.onnx")
    (tmp_path / "weights.pth").write_text("not torch")
    with pytest.raises(ValueError, match="is damaged"):
        read_weights(tmp_path / "weights.pth")


def test_weights_of_another_network_are_listed(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = (
        r"does not hold the weights of a layer: 1 of another shape \(first: weight \(3, 2\) instead of \(2, 2\)\); "
        r"1 missing \(first: bias\); 1 unknown \(first: other\)"
    )
    with pytest.raises(ValueError, match=message):
        fill(torch.nn.Linear(2, 2), read_weights(tmp_path / "w.safetensors"), "w.safetensors", "a layer")


def test_data_parallel_names_are_understood(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in layer.state_dict().items()}}, tmp_path / "w.pth")
    assert torch.equal(read_weights(tmp_path / "w.pth")["weight"], layer.weight)
