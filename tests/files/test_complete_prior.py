"""A diffusers folder that arrives incomplete is refused in one sentence before anything is loaded; every whole one is taken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.published_weights import write_clip_tokenizer
from tests.oracles.tiny import save_tiny, tiny_stable_diffusion
from tests.run.test_kohya import published_shape

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
ONE = {
    "unet": "conv_in.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "encoder.layers.0.self_attn.q_proj.weight",
}
AGAIN = "copy or download"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage; loading it would fail the test."""

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", loads)
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refused(folder: Path, *said: str) -> None:
    """When it is described, before anything loads."""
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        StableDiffusion(path=str(folder), steps=4, device="cpu")
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def rewrite(file: Path, names: Callable[[str], str | None]) -> None:
    state = {new: value for name, value in load_file(file).items() if (new := names(name)) is not None}
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_lost_tensor(copy: Path, component: str) -> None:
    file, lost = copy / component / WEIGHTS[component], ONE[component]
    rewrite(file, lambda name: None if name == lost else name)
    refused(copy, str(file), "1 missing", lost, "copy, download or save")


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize(
    ("prefix", "whose"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "DistributedDataParallel and torch.compile"),
        ("base_model.model.", "merge_and_unload"),
        ("my.own.", "strip that prefix"),
    ],
)
def test_a_prefix(copy: Path, component: str, prefix: str, whose: str) -> None:
    file = copy / component / WEIGHTS[component]
    rewrite(file, lambda name: prefix + name)
    refused(copy, str(file), ONE[component].split(".")[0], repr(prefix), whose)


@pytest.mark.parametrize("component", WEIGHTS)
def test_parts_compiled(copy: Path, component: str) -> None:
    file = copy / component / WEIGHTS[component]
    rewrite(file, lambda name: name.replace(".0.", ".0._orig_mod.", 1))
    refused(copy, str(file), "_orig_mod.", "uncompiled")


@pytest.mark.parametrize("fuse", [False, True], ids=["loaded", "fused"])
@pytest.mark.parametrize("component", WEIGHTS)
def test_saved_with_a_lora_inside(copy: Path, component: str, fuse: bool) -> None:
    pipe = tiny_stable_diffusion()
    network, target = getattr(pipe, component), {"unet": "to_q", "vae": "conv1", "text_encoder": "q_proj"}[component]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[target]), network)
    if fuse:
        for module in network.modules():
            if hasattr(module, "get_delta_weight"):
                module.merge()
    file = copy / component / WEIGHTS[component]
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, file, metadata={"format": "pt"}
    )
    refused(copy, str(file), "LoRA inside", "unload_lora_weights()")


def test_an_old_lora_beside_whole_weights(copy: Path) -> None:
    file = copy / "unet" / WEIGHTS["unet"]
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"
    save_file(load_file(file) | {layer: torch.zeros(2, 16)}, file, metadata={"format": "pt"})
    refused(copy, str(file), layer, "LoRA")


def test_a_fused_and_unloaded_lora_is_an_ordinary_model(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    StableDiffusion(path=str(tmp_path), steps=4)


@pytest.mark.parametrize("component", WEIGHTS)
def test_another_shape(copy: Path, component: str) -> None:
    file, name = copy / component / WEIGHTS[component], ONE[component]
    state = load_file(file)
    wider = {**state, name: torch.cat([state[name], state[name]], 1)}
    save_file(wider, file, metadata={"format": "pt"})
    refused(copy, str(file), "1 of another shape", name, "not of one model")


@pytest.mark.parametrize("component", WEIGHTS)
def test_files_that_are_missing_or_damaged(copy: Path, component: str) -> None:
    file = copy / component / WEIGHTS[component]
    config = copy / component / "config.json"
    text = config.read_text()
    config.write_text(text[: len(text) // 2])
    refused(copy, str(config), "damaged", AGAIN)
    config.unlink()
    refused(copy, str(config), AGAIN)
    config.write_text(text)
    file.rename(file.with_name("renamed.safetensors"))
    refused(copy, component, "renamed.safetensors", file.name)


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_lost_shard(whole: Path, copy: Path, component: str) -> None:
    file = copy / component / WEIGHTS[component]
    state = load_file(file)
    shards = [f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    for shard, part in zip(shards, parts, strict=True):
        save_file(part, file.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shards[i] for i, part in enumerate(parts) for name in part}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    StableDiffusion(path=str(copy), steps=4)
    file.with_name(shards[1]).unlink()
    refused(copy, "index.json", shards[1], AGAIN)
    file.with_name(f"{file.name}.index.json").unlink()
    refused(copy, component, file.name)


@pytest.mark.parametrize(
    "file", ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
)
def test_damaged_small_files(copy: Path, file: str) -> None:
    (copy / file).write_text('{"_class_name": "Sta')
    refused(copy, file.partition("/")[0], AGAIN)
    (copy / file).unlink()
    refused(copy, file.rpartition("/")[2])


def test_a_component_without_a_class(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    for value in ([None, None], ["mine", "Encoder"], ["transformers", "NoSuchModel"]):
        (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": value}))
        refused(copy, "model_index.json", "text_encoder")
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "tokenizer"}))
    refused(copy, "model_index.json", "tokenizer")


def with_published_tokenizer(folder: Path) -> Path:
    """CLIP's vocabulary as vocab.json and merges.txt, which most folders have, and a text encoder with rows for it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.vocab_size = 49408
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    write_clip_tokenizer(folder / "tokenizer")
    return folder / "tokenizer"


def test_no_vocabulary(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    refused(copy, "tokenizer", "no vocabulary", AGAIN)


def test_parts_of_the_published_vocabulary(copy: Path) -> None:
    place = with_published_tokenizer(copy)
    StableDiffusion(path=str(copy), steps=4)
    for file in (place / "vocab.json", place / "merges.txt"):
        kept = file.read_text()
        file.unlink()
        refused(copy, str(place), file.name, AGAIN)
        file.write_text(kept[: len(kept) // 2])
        refused(copy, str(place), AGAIN)
        file.write_text(kept)
    (place / "vocab.json").write_text("{}")
    refused(copy, str(place), AGAIN)


def test_tokens_that_the_text_encoder_has_no_row_for(copy: Path) -> None:
    pipe = tiny_stable_diffusion()
    pipe.tokenizer.add_tokens(["<my-cat>", "<my-dog>"])
    pipe.tokenizer.save_pretrained(copy / "tokenizer")
    refused(copy, "2 tokens", "'<my-cat>'", "514", "resize_token_embeddings")


def features(folder: Path, **settings: Any) -> Any:
    return StableDiffusion(str(folder), steps=4, device="cpu", **settings).features(["a cat"])


def test_sharded_folders_load(whole: Path, tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path, max_shard_size="20KB")
    for component, file in WEIGHTS.items():
        assert (tmp_path / component / f"{file}.index.json").is_file()
    assert torch.equal(features(tmp_path), features(whole))


def test_fp16_beside_plain_and_non_ema_files_load(whole: Path, tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion()
    pipe.unet.save_pretrained(tmp_path / "half" / "unet")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for component in ("vae", "text_encoder"):
        shutil.copy(whole / component / WEIGHTS[component], tmp_path / "half" / component)
    shutil.copy(
        whole / "unet" / WEIGHTS["unet"], tmp_path / "half" / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    )
    assert torch.equal(features(tmp_path / "half"), features(whole))
    half = features(tmp_path / "half", variant="fp16")
    assert not torch.equal(half, features(whole))
    torch.testing.assert_close(half, features(whole), atol=0.05, rtol=0)


def test_a_damaged_variant_is_refused(tmp_path: Path) -> None:
    tiny_stable_diffusion().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    file = tmp_path / "text_encoder" / "model.fp16.safetensors"
    rewrite(file, lambda name: None if "q_proj" in name else name)
    refused(tmp_path, str(file), "missing")


def test_textual_inversion_tokens_load(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion()
    pipe.tokenizer.add_tokens(["<my-cat>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(tmp_path)
    assert features(tmp_path).isfinite().all()


def test_names_of_older_versions_load(whole: Path, tmp_path: Path) -> None:
    """Text encoders under `text_model.` with their positions; attention of autoencoders as query, key, value, proj_attn."""
    pipe = tiny_stable_diffusion()
    pipe.register_modules(vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8))
    pipe.save_pretrained(tmp_path)
    text, vae = (tmp_path / component / WEIGHTS[component] for component in ("text_encoder", "vae"))
    rewrite(text, lambda name: f"text_model.{name}")
    old = load_file(text) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(old, text, metadata={"format": "pt"})
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"\b(to_q|to_k|to_v|to_out\.0)\b")
    rewrite(vae, lambda name: pattern.sub(lambda found: names[found[1]], name))
    assert any("proj_attn" in name for name in load_file(vae))
    loaded = StableDiffusion(str(tmp_path), steps=4, device="cpu")
    assert torch.equal(loaded.features(["a cat"]), features(whole))
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(loaded.pipe.vae.state_dict()[name], value)


def test_the_layout_of_stable_diffusion_2_loads(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion("v_prediction")
    pipe.register_modules(unet=published_shape(linear=True))
    pipe.save_pretrained(tmp_path)
    StableDiffusion(path=str(tmp_path), steps=4)


def test_surplus_tensors_are_told(copy: Path) -> None:
    file = copy / "unet" / WEIGHTS["unet"]
    save_file(load_file(file) | {"extra.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"extra\.weight.*not used"):
        StableDiffusion(path=str(copy), steps=4)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e6, "float16")])
def test_weights_that_are_no_numbers(whole: Path, tmp_path: Path, component: str, value: float, dtype: Any) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = folder / component / WEIGHTS[component]
    state = load_file(file)
    state[ONE[component]].view(-1)[3] = value
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{component}: 1 of \d+ values of .*{re.escape(ONE[component])}.*torch\.{dtype}"
    ):
        StableDiffusion(str(folder), steps=4, device="cpu", dtype=dtype).load_weights()
