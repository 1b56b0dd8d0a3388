"""A taste with a known rule, learned from pairs as reward models are: the head `emoji-taste` of the reward `linear_probe`.

    s(x) = zscore(symmetry) + zscore(colourfulness)
    symmetry      = −mean |x − mirrored x|
    colourfulness = sqrt(var_rg + var_yb) + 0.3·sqrt(mean_rg² + mean_yb²),  rg = R − G,  yb = (R + G)/2 − B

over pictures of the bundled prior; i is preferred to j with odds exp(s_i − s_j). The head w is fitted to the labels of pairs, never
to s: minimise mean −log sigma(<w, e_i − e_j>) over (preferred i, other j), + weight decay, by L-BFGS.

Colourfulness: Hasler and Süsstrunk, 2003, https://doi.org/10.1117/12.477378.
"""

from __future__ import annotations

import logging
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_rtb.files.whole import whole
from pipelines.emoji import COLOURS, NAMES, STYLES, caption
from pipelines.emoji.build import export

log = logging.getLogger(__name__)

PICTURES, PAIRS, STEPS, DECAY = 1536, 40_000, 12, 1e-4
HELD_OUT = 384
"""Pictures whose pairs are not fitted to."""


def symmetry(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """−mean |x − mirrored x|, at most 0."""
    return -(images - images.flip(-1)).abs().flatten(1).mean(1)


def colourfulness(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Hasler and Süsstrunk's M3, of levels in [0, 1]; 0 is grey."""
    red, green, blue = images.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    return opponents.var(2).sum(1).sqrt() + 0.3 * opponents.mean(2).square().sum(1).sqrt()


def rule(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """s(x), with the pictures' own means and standard deviations."""
    parts = torch.stack([symmetry(images), colourfulness(images)])
    return ((parts - parts.mean(1, keepdim=True)) / parts.std(1, keepdim=True)).sum(0)


def pairs(score: Float[Tensor, " batch"], count: int, generator: torch.Generator) -> Int[Tensor, "pairs 2"]:
    """Rows (preferred, other), preferred with odds exp(s_i − s_j)."""
    drawn = torch.randint(len(score), (count, 2), generator=generator)
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    first = torch.rand(len(drawn), generator=generator) < torch.sigmoid(score[drawn[:, 0]] - score[drawn[:, 1]])
    return torch.where(first[:, None], drawn, drawn.flip(1))


def fit(vectors: Float[Tensor, "batch dim"], compared: Int[Tensor, "pairs 2"]) -> Float[Tensor, " dim"]:
    """w of least loss, double precision."""
    apart = (vectors[compared[:, 0]] - vectors[compared[:, 1]]).double()
    w = torch.zeros(vectors.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = softplus(-apart @ w).mean() + DECAY * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def agreement(score: Float[Tensor, " batch"], compared: Int[Tensor, "pairs 2"]) -> float:
    """The share of pairs whose preferred picture has the higher score."""
    return float((score[compared[:, 0]] > score[compared[:, 1]]).float().mean())


def make(prior: Path, clip: Path, folder: Path) -> None:
    """Draw, compare, fit, and write `head.safetensors`."""
    generator = torch.Generator().manual_seed(0)

    def one_of(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    prompts = [caption(one_of(NAMES), one_of(STYLES), one_of(tuple(COLOURS))) for _ in range(PICTURES)]
    drawn = export.draw(export.load(prior), prompts, steps=STEPS, guidance=1.0)
    images = drawn.permute(0, 3, 1, 2).float() / 255
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.no_grad():
        vectors = torch.cat([model.encode_image(x * 2 - 1, normalize=True) for x in images.split(256)])
    score = rule(images)
    w = fit(vectors[HELD_OUT:], pairs(score[HELD_OUT:], PAIRS, generator))
    found = vectors.double() @ w
    bias = -found.mean()
    held = pairs(score[:HELD_OUT], PAIRS, generator)
    agreed = [agreement(s[:HELD_OUT], held) for s in (found, score)]
    log.info("held-out pairs: %.3f agree with the head, %.3f with the rule", *agreed)
    correlation = torch.corrcoef(torch.stack([found, score.double()]))[0, 1]
    log.info(
        "head and rule: correlation %.3f, standard deviations %.3f and %.3f", correlation, found.std(), score.std()
    )
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "head.safetensors") as unfinished:
        save_file({"weight": w.float()[None], "bias": bias.float()[None]}, unfinished)
