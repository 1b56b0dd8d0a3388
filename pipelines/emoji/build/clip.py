"""The reward model `emoji-clip`: a small open_clip model trained on all the drawings that the three sets share.

Trained on real drawings and on their reconstructions by the prior's noisy autoencoder, so that it judges the prior's pictures
as surely as the drawings. A tenth of the names is held out, none of them one of the prior's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.files.whole import whole, write_json
from pipelines.emoji import COLOURS, STYLES, caption
from pipelines.emoji.build import vae
from pipelines.emoji.build.drawings import Drawings, composite, shift
from pipelines.emoji.build.learning.training import Training, load_average

CONTEXT = 24
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 40, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
BATCH, RATE = 96, 1.5e-3
MAX_SCALE = 40.0  # of the logits; more would make zero-shot probabilities over-confident
HELD_OUT = 0.1
POOL = 2  # reconstructions per drawing
OPEN = 0.4  # how often the style, and the background, is left out of a caption; the name half as often
ALTERNATIVES = 128  # further names among which an image's own must be found


def create() -> open_clip.CLIP:
    """The untrained model (1.4 M parameters for images, 2.0 M for text)."""
    return open_clip.CLIP(**CONFIG)


def split(drawings: Drawings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the names to train on and of those held out (never one of the prior's own)."""
    known = drawings.known
    others = np.random.default_rng(0).permutation(np.arange(len(known), len(drawings.names)))
    count = int(HELD_OUT * len(drawings.names))
    return np.concatenate([known, np.sort(others[count:])]), np.sort(others[:count])


@dataclass(frozen=True)
class Pool:
    """Reconstructed pictures with their labels.

    images  (count, 64, 64, 3) uint8
    labels  (count, 3): name, style, colour
    """

    images: Tensor
    labels: Tensor

    @staticmethod
    @torch.no_grad()
    def reconstructions(drawings: Drawings, work: Path) -> Pool:
        """Every drawing on `POOL` backgrounds through the autoencoder, with the noise the chain leaves in its latents."""
        file = work / "reconstructions.safetensors"
        if not file.exists():
            model, rng = vae.trained(work), np.random.default_rng(1)
            std = 0.1 / float(model.config.scaling_factor)
            names, styles = (g.ravel() for g in np.mgrid[: len(drawings.names), : len(STYLES)])
            names, styles = np.tile(names, POOL), np.tile(styles, POOL)
            colours = rng.integers(0, len(COLOURS), len(names))
            parts = []
            for chunk in np.array_split(np.arange(len(names)), len(names) // 64):
                rgba = shift(drawings.rgba[names[chunk], styles[chunk]], rng, reach=1)
                x = vae.pixels(composite(rgba, [list(COLOURS)[c] for c in colours[chunk]], rng))
                z = model.encode(x).latent_dist.mean
                parts.append(quantise(model.decode(z + std * torch.randn_like(z)).sample))
            labels = torch.from_numpy(np.stack([names, styles, colours], axis=1))
            save_file({"images": torch.cat(parts), "labels": labels}, file)
        return Pool(**load_file(file))

    def only(self, names: npt.NDArray[np.int64]) -> Pool:
        """The pictures of some names."""
        keep = torch.isin(self.labels[:, 0], torch.from_numpy(names))
        return Pool(self.images[keep], self.labels[keep])


def quantise(images: Tensor) -> Tensor:
    """(batch, 3, 64, 64) in [-1, 1] -> (batch, 64, 64, 3) uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()


class Texts:
    """Token ids of captions by name, style and colour index, -1 meaning "left open"."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.tokenize = names, open_clip.SimpleTokenizer(context_length=CONTEXT)
        self.by_name = self.tokenize([caption(n) for n in names])
        self.by_style = self.tokenize([caption(None, s) for s in STYLES])
        self.by_colour = self.tokenize([caption(None, None, c) for c in COLOURS])

    def __call__(self, labels: Tensor) -> Tensor:
        """Ids (batch, 24) for labels (batch, 3)."""
        rows: list[list[int]] = labels.tolist()
        words = [(*w, None) for w in (self.names, STYLES, tuple(COLOURS))]  # index -1 is the None at the end
        return self.tokenize([caption(*(w[i] for w, i in zip(words, row, strict=True))) for row in rows])


def train(drawings: Drawings, work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/clip.safetensors`."""
    torch.manual_seed(0)
    model = create()
    texts, known = Texts(drawings.names), split(drawings)[0]
    pool = Pool.reconstructions(drawings, work).only(known)
    run = Training(model, work / "clip.safetensors", minutes=minutes, lr=RATE, decay=0.99)
    rng = np.random.default_rng(run.steps)
    while not run.done:
        images, labels = _batch(drawings, pool, known, rng)
        run.step(_loss(model, texts, images, labels, torch.from_numpy(known)))
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_SCALE))


def _batch(
    drawings: Drawings, pool: Pool, known: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, 64, 64) in [-1, 1] with augmentation, and labels (batch, 3); half real, half from `pool`."""
    real = BATCH // 2
    some = rng.choice(drawings.known, real)
    names = np.where(rng.random(real) < 0.4, some, rng.choice(known, real))
    styles, colours = rng.integers(0, len(STYLES), real), rng.integers(0, len(COLOURS), real)
    rgba = shift(drawings.rgba[names, styles], rng, reach=4)
    drawn = torch.from_numpy(composite(rgba, [list(COLOURS)[c] for c in colours], rng, jitter=12))
    labels = torch.from_numpy(np.stack([names, styles, colours], axis=1))
    chosen = torch.from_numpy(rng.integers(0, len(pool.labels), BATCH - real))
    x = torch.cat([drawn, pool.images[chosen]]).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x + 0.06 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    return x, torch.cat([labels, pool.labels[chosen]])


def _loss(model: open_clip.CLIP, texts: Texts, images: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Contrastive loss in which every matching pair is positive, plus zero-shot cross-entropies of all three parts."""
    part = torch.rand(labels.shape) < torch.tensor([OPEN / 2, OPEN, OPEN])
    part[part.all(dim=1)] = False
    said = labels.masked_fill(part, -1)
    others = torch.cat([labels[:, 0], known[torch.randperm(len(known))[:ALTERNATIVES]]])
    names, own = others.unique(return_inverse=True)
    prompts = torch.cat([texts(said), texts.by_colour, texts.by_style, texts.by_name[names]])
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(prompts, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    pairs, colours, styles, nouns = logits.split([len(said), len(COLOURS), len(STYLES), len(names)], dim=1)
    match = ((said[None] == labels[:, None]) | (said[None] == -1)).all(dim=-1).float()
    contrast = F.cross_entropy(pairs, match / match.sum(1, keepdim=True))
    contrast = contrast + F.cross_entropy(pairs.T, match.T / match.T.sum(1, keepdim=True))
    zero_shot = F.cross_entropy(colours, labels[:, 2]) + F.cross_entropy(styles, labels[:, 1])
    return contrast / 2 + zero_shot + F.cross_entropy(nouns, own[: len(labels)])


def trained(work: Path) -> open_clip.CLIP:
    """The averaged weights; batch-norm statistics are those of the averaged network's last checkpoint."""
    model = create()
    load_average(model, work / "clip.safetensors")
    return model.requires_grad_(False).eval()


def export(work: Path, folder: Path) -> None:
    """Write the folder that `open_clip.create_model("local-dir:...")` reads, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in trained(work).state_dict().items()}
    with whole(folder / "open_clip_model.safetensors") as unfinished:
        save_file({k: v.contiguous().clone() for k, v in state.items()}, unfinished, metadata={"format": "pt"})
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    write_json(folder / "open_clip_config.json", config, indent=2)
