"""A reward's network or tokenizer that arrives incomplete is refused in one sentence before anything is trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from rewards.clip_score import ClipScore
from tests.oracles.published_weights import (
    aesthetic_head,
    bert_tokenizer,
    hps_v2,
    hub_cache,
    image_reward,
    openai_clip,
    siglip,
    transformers_clip,
    transformers_clip_processor,
)
from tests.oracles.tiny_rewards import CLASSES, some_images, tiny_clip
from tests.rewards.test_clip_score import whole_clip

State = dict[str, Tensor]


def renamed(names: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {names(name): value for name, value in state.items()}


def lost(state: State) -> State:
    matrix = next(name for name, value in sorted(state.items()) if value.ndim > 1 and name.endswith("weight"))
    return {name: value for name, value in state.items() if name != matrix}


def not_a_number(state: State) -> State:
    matrix = next(name for name, value in sorted(state.items()) if value.ndim > 1 and name.endswith("weight"))
    value = state[matrix].clone()
    value.view(-1)[0] = torch.nan
    return {**state, matrix: value}


def with_lora(state: State) -> State:
    """As peft names the layers that it wraps."""
    wrapped = [name for name, value in sorted(state.items()) if value.ndim > 1 and name.endswith(".weight")][:2]
    layers = {f"{name.removesuffix('.weight')}.base_layer.weight": state[name] for name in wrapped}
    pairs = {
        f"{name.removesuffix('.weight')}.lora_{part}.default.weight": torch.zeros(2, 2)
        for name in wrapped
        for part in "AB"
    }
    return {name: value for name, value in state.items() if name not in wrapped} | layers | pairs


DAMAGES: dict[str, tuple[Callable[[State], State], str]] = {
    "lost": (lost, r"1 missing \(first: .*copy, download or save"),
    "lora": (with_lora, "LoRA inside: .*merge_and_unload"),
    "nan": (not_a_number, r"1 of \d+ values of .* are NaN or infinite"),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), "'_orig_mod.', which torch.compile put there"),
    "parallel": (renamed(lambda name: f"module.{name}"), "'module.', which DistributedDataParallel put there"),
}


def refused(component: dict[str, Any], message: str, early: bool = True) -> None:
    """By `describe` before anything loads, or else when the reward is built, which is before training."""
    attempt = describe if early else build
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        attempt(component, "reward")
    assert "\n" not in str(caught.value)


def damage(file: Path, by: Callable[[State], State]) -> None:
    if file.suffix == ".safetensors":
        save_file(by(load_file(file)), file, metadata={"format": "pt"})
        return
    content = torch.load(file, weights_only=True)
    inner = content.get("state_dict")
    torch.save(by(content) if inner is None else {"state_dict": by(inner)}, file)


FOLDERS: dict[str, tuple[Callable[[], Path], dict[str, Any]]] = {
    "clip_score": (whole_clip, {}),
    "siglip_score": (lambda: siglip("siglip"), {}),
    "siglip_score 2": (lambda: siglip("siglip2"), {}),
    "siglip_score naflex": (lambda: siglip("naflex"), {}),
    "pick_score": (transformers_clip, {"processor": str(transformers_clip_processor())}),
    "classifier": (whole_clip, {"target": 0, "classes": CLASSES}),
}


def copied(name: str, to: Path) -> tuple[Path, dict[str, Any]]:
    folder, settings = FOLDERS[name]
    copy = Path(shutil.copytree(folder(), to / "model"))
    return copy, {"component": name.partition(" ")[0], "model": str(copy), **settings}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FOLDERS)
def test_networks_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    by, message = DAMAGES[kind]
    folder, component = copied(name, tmp_path)
    damage(folder / "model.safetensors", by)
    where = "" if kind == "nan" else re.escape(str(folder / "model.safetensors"))
    refused(component, f"{where}.*{message}", early=kind != "nan")


@pytest.mark.parametrize("name", ["clip_score", "siglip_score", "siglip_score 2", "siglip_score naflex", "classifier"])
def test_no_vocabulary(tmp_path: Path, name: str) -> None:
    folder, component = copied(name, tmp_path)
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        (folder / file).unlink(missing_ok=True)
    refused(component, "model has no vocabulary.*copy or download")


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    folder, component = copied("clip_score", tmp_path)
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    refused(component, "has no vocabulary .* all texts are the same to it")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "preprocessor_config.json", "config.json"])
def test_parts_and_halves_of_small_files(tmp_path: Path, file: str) -> None:
    folder, component = copied("clip_score", tmp_path)
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    refused(component, "copy or download")
    (folder / file).unlink()
    refused(component, re.escape(file))


def test_shards(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder, component = copied("clip_score", tmp_path)
    expected = build(component, "reward")(some_images(2), CLASSES[:2])
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(whole_clip()).save_pretrained(folder, max_shard_size="8KB")
    torch.testing.assert_close(build(component, "reward")(some_images(2), CLASSES[:2]), expected)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(component, rf"index\.json names \d+ files, and 1 are not there \({shard.name}\)")


def test_half_precision_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, component = copied("clip_score", tmp_path)
    half = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    found = build(component, "reward")(some_images(3), CLASSES)
    torch.testing.assert_close(found, ClipScore(str(whole_clip()))(some_images(3), CLASSES), rtol=0, atol=0.01)
    hub_cache(tmp_path / "hub", "someone/half", {file.name: file for file in folder.iterdir()}, monkeypatch)
    again = build({"component": "clip_score", "model": "someone/half"}, "reward")(some_images(3), CLASSES)
    assert torch.equal(again, found)


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = copied("clip_score", tmp_path)
    damage(folder / "model.safetensors", lost)
    hub_cache(tmp_path / "hub", "someone/cut", {file.name: file for file in folder.iterdir()}, monkeypatch)
    refused({"component": "clip_score", "model": "someone/cut"}, "someone/cut.*1 missing", early=False)


def test_positions_are_harmless(tmp_path: Path) -> None:
    folder, component = copied("clip_score", tmp_path)
    old = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    damage(folder / "model.safetensors", lambda state: state | old)
    describe(component, "reward")


@pytest.mark.parametrize("kind", ["lost", "lora", "nan", "compiled"])
def test_folders_of_open_clip(tmp_path: Path, kind: str) -> None:
    by, message = DAMAGES[kind]
    folder = Path(shutil.copytree(tiny_clip(), tmp_path / "model"))
    damage(folder / "open_clip_model.safetensors", by)
    refused({"component": "clip_score", "model": str(folder)}, message, early=kind == "lora")


def test_data_parallel_folders_of_open_clip_load(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip(), tmp_path / "model"))
    damage(folder / "open_clip_model.safetensors", DAMAGES["parallel"][0])
    images = some_images(3)
    assert torch.equal(ClipScore(str(folder))(images, CLASSES), ClipScore(str(tiny_clip()))(images, CLASSES))


def test_a_bias_is_not_made_up(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip(), tmp_path / "model"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -10
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused({"component": "clip_score", "model": str(folder)}, "1 missing .first: logit_bias", early=False)


def resnet(to: Path) -> Path:
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model("squeezenet1_1", num_classes=2).state_dict(), to / "net.pth")
    return to / "net.pth"


FILES: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "hps_v2": (lambda _: hps_v2(), "weights", {}),
    "image_reward": (lambda _: image_reward(), "weights", {"tokenizer": str(bert_tokenizer())}),
    "aesthetic": (lambda _: aesthetic_head(), "weights", {"clip": str(openai_clip())}),
    "aesthetic clip": (lambda _: openai_clip(), "clip", {"weights": str(aesthetic_head())}),
    "classifier": (resnet, "weights", {"model": "torchvision:squeezenet1_1", "classes": ["a", "b"], "target": 0}),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str, kind: str) -> None:
    source, key, settings = FILES[name]
    by, message = DAMAGES[kind]
    file = source(tmp_path)
    copy = Path(shutil.copy(file, tmp_path / f"copy{file.suffix}"))
    damage(copy, by)
    component = {"component": name.partition(" ")[0], **settings, key: str(copy)}
    if kind in ("compiled", "parallel"):  # taken off: nothing else begins so
        images, whole = some_images(2), {**component, key: str(file)}
        assert torch.equal(*(build(c, "reward")(images, CLASSES[:2]) for c in (component, whole)))
    else:
        refused(component, rf"copy\{file.suffix}.*({message}|it has no '|holds no|not hold|is not)", early=False)


def test_lora_in_a_safetensors_file_is_seen_before_loading(tmp_path: Path) -> None:
    save_file(with_lora(torch.load(hps_v2(), weights_only=True)["state_dict"]), tmp_path / "hps.safetensors")
    refused({"component": "hps_v2", "weights": str(tmp_path / "hps.safetensors")}, "LoRA inside")


def test_overflow_in_half_precision_is_seen(tmp_path: Path) -> None:
    folder, component = copied("clip_score", tmp_path)

    def large(state: State) -> State:
        return {name: value * 1e6 if name == "visual_projection.weight" else value for name, value in state.items()}

    damage(folder / "model.safetensors", large)
    build(component, "reward")
    refused(
        component | {"dtype": "float16"}, r"visual_projection.weight are NaN or infinite in torch\.float16", early=False
    )
