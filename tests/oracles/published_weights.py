"""Small random weights in the published layouts: the same key names, file formats and number types as the real files.

The rewards load them through their public arguments, so what a test exercises is the path of the real weights. Random
networks hardly tell images or texts apart, so some weights are drawn larger than an initialisation would.
"""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

WORDS = ["a", "an", "cat", "dog", "emoji", "blue", "red", "thing", "cup", "flat", "style", "roses", "four", ",", "."]


def published(name: str) -> dict[str, Any]:
    """Arguments with which a reward of this name is built here; {} for rewards without published weights."""
    if name == "image_reward":
        return {"weights": str(image_reward()), "tokenizer": str(bert_tokenizer())}
    if name == "pick_score":
        return {"model": str(transformers_clip()), "processor": str(transformers_clip_processor())}
    if name == "hps_v2":
        return {"weights": str(hps_v2())}
    if name == "aesthetic":
        return {"weights": str(aesthetic_head()), "clip": str(openai_clip())}
    return {"model": str(siglip("siglip2"))} if name == "siglip_score" else {}


def folder(name: str) -> Path:
    return Path(mkdtemp(prefix=f"{name}-"))


def hub_cache(root: Path, repository: str, files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's client leaves on disk after a download, in a cache at `root`; the hub itself is out of reach."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    place = root / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    for name, file in files.items():
        shutil.copy(file, place / "snapshots" / commit / name)


@torch.no_grad()
def drawn(module: nn.Module, seed: int, spread: float = 1.0) -> nn.Module:
    """Every parameter redrawn: matrices keep the size of signals, times `spread`; biases and offsets are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("logit_scale", "logit_bias")):
            continue
        if parameter.ndim < 2:
            parameter.copy_(
                noise * 0.1 + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0) * name.endswith("weight")
            )
        elif "embed" in name or "token" in name:
            parameter.copy_(noise * spread)
        else:
            parameter.copy_(noise * spread / parameter[0].numel() ** 0.5)
    return module.eval()


BERT = {"width": 24, "depth": 2, "hidden": 32, "positions": 40}
VIT = {"width": 32, "depth": 2, "hidden": 48, "patch": 8, "grid": 4}


@lru_cache
def bert_tokenizer() -> Path:
    """A folder with BERT's `vocab.txt`: its special tokens, some words, all letters as pieces."""
    found = folder("bert")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789'\"-!?")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    (found / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)) + "\n")
    return found


def image_reward_state(seed: int = 0) -> dict[str, Tensor]:
    """Names as BLIP and ImageReward give them, written out: nothing of the package is used."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, spread: float = 1.0) -> None:
        state[name] = spread * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, into: int, spread: float = 1.0) -> None:
        draw(f"{name}.weight", out, into, spread=spread * into**-0.5)
        draw(f"{name}.bias", out, spread=0.1)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        draw(f"{name}.bias", width, spread=0.1)

    w, t = VIT["width"], BERT["width"]
    see, read = "blip.visual_encoder", "blip.text_encoder"
    draw(f"{see}.cls_token", 1, 1, w)
    draw(f"{see}.pos_embed", 1, VIT["grid"] ** 2 + 1, w)
    draw(f"{see}.patch_embed.proj.weight", w, 3, VIT["patch"], VIT["patch"], spread=0.3)
    draw(f"{see}.patch_embed.proj.bias", w, spread=0.1)
    for i in range(VIT["depth"]):
        block = f"{see}.blocks.{i}"
        norm(f"{block}.norm1", w)
        linear(f"{block}.attn.qkv", 3 * w, w, spread=2)
        linear(f"{block}.attn.proj", w, w)
        norm(f"{block}.norm2", w)
        linear(f"{block}.mlp.fc1", VIT["hidden"], w)
        linear(f"{block}.mlp.fc2", w, VIT["hidden"])
    norm(f"{see}.norm", w)

    vocabulary = len((bert_tokenizer() / "vocab.txt").read_text().splitlines()) + 2  # [DEC] and [ENC]
    state[f"{read}.embeddings.position_ids"] = torch.arange(BERT["positions"])[None]
    draw(f"{read}.embeddings.word_embeddings.weight", vocabulary, t)
    draw(f"{read}.embeddings.position_embeddings.weight", BERT["positions"], t)
    norm(f"{read}.embeddings.LayerNorm", t)
    for i in range(BERT["depth"]):
        layer = f"{read}.encoder.layer.{i}"
        for attention, source in (("attention", t), ("crossattention", w)):
            for part, into in (("query", t), ("key", source), ("value", source)):
                linear(f"{layer}.{attention}.self.{part}", t, into, spread=2)
            linear(f"{layer}.{attention}.output.dense", t, t)
            norm(f"{layer}.{attention}.output.LayerNorm", t)
        linear(f"{layer}.intermediate.dense", BERT["hidden"], t)
        linear(f"{layer}.output.dense", t, BERT["hidden"])
        norm(f"{layer}.output.LayerNorm", t)
    linear("blip.vision_proj", 8, w)
    linear("blip.text_proj", 8, t)
    return {**state, **{f"mlp.{name}": value for name, value in head_state(t, seed).items()}}


@lru_cache
def image_reward() -> Path:
    """`ImageReward.pt`: a bare state dict, float32."""
    file = folder("image-reward") / "ImageReward.pt"
    torch.save(image_reward_state(), file)
    return file


def head_state(width: int, seed: int = 0) -> dict[str, Tensor]:
    """A linear head: `layers.0`, `2`, `4`, `6` and `7`."""
    generator = torch.Generator().manual_seed(seed + 1)
    state = {}
    for place, (into, out) in zip((0, 2, 4, 6, 7), ((width, 20), (20, 12), (12, 8), (8, 6), (6, 1)), strict=True):
        state[f"layers.{place}.weight"] = 1.5 * into**-0.5 * torch.randn(out, into, generator=generator)
        state[f"layers.{place}.bias"] = 0.3 * torch.randn(out, generator=generator)
    return state


def clip_config(architecture: str) -> dict[str, Any]:
    """The architecture with its numbers of heads and its activation, and small sizes."""
    config = open_clip.get_model_config(architecture)
    heads = config["vision_cfg"]["width"] // config["vision_cfg"].get("head_width", 64)
    vision = {"image_size": 32, "layers": 2, "width": 2 * heads, "head_width": 2, "patch_size": 8, "mlp_ratio": 1.5}
    text = {
        **config["text_cfg"],
        "context_length": 16,
        "width": 2 * config["text_cfg"]["heads"],
        "layers": 2,
        "mlp_ratio": 2,
    }
    return {**config, "embed_dim": 12, "vision_cfg": vision, "text_cfg": text}


@lru_cache
def clip_model(architecture: str) -> Any:
    """The same network, made by open_clip itself: the oracle."""
    with torch.random.fork_rng(devices=[]):
        return drawn(open_clip.model.CLIP(**clip_config(architecture)), seed=1, spread=1.5)


@lru_cache
def hps_v2() -> Path:
    """`HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt`: {"state_dict": float16 tensors of a ViT-H-14}."""
    file = folder("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {k: v.half() for k, v in clip_model("ViT-H-14").state_dict().items()}}, file)
    return file


@lru_cache
def openai_clip() -> Path:
    """OpenAI's ViT-L/14 as a state dict, with the three numbers its file holds besides."""
    model = clip_model("ViT-L-14-quickgelu")
    numbers = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(16),
        "vocab_size": torch.tensor(49408),
    }
    file = folder("openai") / "ViT-L-14.pt"
    torch.save({**model.state_dict(), **numbers}, file)
    return file


@lru_cache
def openai_archive() -> Path:
    """OpenAI's ViT-L/14 as it is downloaded: a TorchScript archive of float16 tensors, which `torch.load` refuses."""
    file = folder("openai-archive") / "ViT-L-14.pt"
    traced(deepcopy(clip_model("ViT-L-14-quickgelu")), 32, 16).half().save(str(file))
    return file


def traced(model: Any, side: int, context: int) -> Any:
    """A CLIP as OpenAI made its archives: its two methods recorded."""
    inputs = {"encode_image": torch.rand(1, 3, side, side), "encode_text": torch.randint(0, 99, (1, context))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return torch.jit.trace_module(model, inputs, check_trace=False)


@lru_cache
def aesthetic_head() -> Path:
    """`sac+logos+ava1-l14-linearMSE.pth`: a bare state dict."""
    file = folder("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(head_state(clip_config("ViT-L-14-quickgelu")["embed_dim"]), file)
    return file


def write_clip_tokenizer(to: Path) -> None:
    """CLIP's own vocabulary, from the copy in open_clip, as `vocab.json` and `merges.txt`."""
    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    vocabulary = {token: i for i, token in enumerate(open_clip.SimpleTokenizer().encoder)}
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(k, k): i
        for k, i in vocabulary.items()
    }
    (to / "vocab.json").write_text(json.dumps(vocabulary))
    (to / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (to / "tokenizer_config.json").write_text(json.dumps(settings))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content))


@lru_cache
def transformers_clip() -> Path:
    """As yuvalkirstain/PickScore_v1: `config.json` and `model.safetensors` of a CLIPModel; no tokenizer, no processor."""
    from transformers import CLIPConfig, CLIPModel

    found = folder("pick-score")
    tower = {"hidden_act": "gelu", "num_attention_heads": 4, "num_hidden_layers": 2, "projection_dim": 12}
    text = {**tower, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = {**tower, "hidden_size": 24, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, logit_scale_init_value=4.6)
        drawn(CLIPModel(config), seed=2, spread=1.5).save_pretrained(found)  # type: ignore[operator]
    return found


@lru_cache
def transformers_clip_processor() -> Path:
    """As laion/CLIP-ViT-H-14-laion2B-s32B-b79K: tokenizer files, and a `preprocessor_config.json` with plain numbers."""
    found = folder("clip-h")
    write_clip_tokenizer(found)
    write_json(found / "config.json", {"model_type": "clip", "architectures": ["CLIPModel"]})
    write_json(
        found / "preprocessor_config.json",
        {
            "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 32,
        },
    )  # fmt: skip
    return found


def write_sentencepiece(to: Path) -> None:
    """A real SentencePiece model as SigLIP has one, trained on a few words."""
    import sentencepiece

    corpus = to / "corpus.txt"
    corpus.write_text(
        "\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))) + "\nabcdefghijklmnopqrstuvwxyz\n"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(to / "spiece"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    settings = {
        "tokenizer_class": "SiglipTokenizer",
        "model_max_length": 64,
        "do_lower_case": True,
        "pad_token": "</s>",
    }
    write_json(to / "tokenizer_config.json", {**settings, "eos_token": "</s>", "unk_token": "<unk>"})


def write_gemma_tokenizer(to: Path) -> None:
    """A `tokenizer.json` as SigLIP 2 has one: spaces become ▁, one end token, padded on the right."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["▁", ",", "."]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *letters]
    tokenizer: Any = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(to / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "padding_side": "right"}
    write_json(
        to / "tokenizer_config.json", {**settings, "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    )


@lru_cache
def siglip(kind: str) -> Path:
    """A folder as google/siglip-base-patch16-224 ("siglip"), siglip2-base-patch16-224 ("siglip2", fixed resolution) or
    siglip2-base-patch16-naflex ("naflex") have it."""
    import transformers

    found = folder(kind)
    tower = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32}
    text = {**tower, "vocab_size": 60, "max_position_embeddings": 64, "projection_size": 24}
    text |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    vision: dict[str, Any] = {**tower, "patch_size": 8}
    family = "Siglip2" if kind == "naflex" else "Siglip"
    settings: dict[str, Any] = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3}
    settings |= {"image_std": [0.5] * 3, "rescale_factor": 1 / 255, "image_processor_type": f"{family}ImageProcessor"}
    if kind == "naflex":
        vision["num_patches"] = 16
        settings |= {"resample": 2, "patch_size": 8, "max_num_patches": 20}
    else:
        vision["image_size"] = 32
        settings |= {"resample": 3, "size": {"height": 32, "width": 32}}
    write_json(found / "preprocessor_config.json", settings)
    (write_sentencepiece if kind == "siglip" else write_gemma_tokenizer)(found)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        model = drawn(getattr(transformers, f"{family}Model")(config), seed=3, spread=1.5)
        with torch.no_grad():
            model.get_parameter("logit_scale").fill_(2.0)
            model.get_parameter("logit_bias").fill_(-1.5)
    model.save_pretrained(found)  # type: ignore[operator]
    return found
