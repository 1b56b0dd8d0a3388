"""How well an image fits its prompt, by SigLIP or SigLIP 2: a calibrated probability of the pair, not a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards._models.image_text import check_image_text_model, image_text_model
from rewards._models.network import Dtype
from rewards._models.two_towers import ImageTextReward, TwoTowers

__all__ = ["SiglipScore"]

OUTPUTS = ("logit", "log_prob", "cosine")

KINDS = ("siglip", "siglip2")


class SiglipScore(ImageTextReward):
    r"""r(x) = scale · logit, with logit = exp(t) · <e_image(x), e_text(prompt)> + b of the model's own t and b.

    `output` "log_prob" is log sigmoid(logit) <= 0, the log-probability in nats that image and prompt belong together: with it,
    beta = 1 tilts the prior to p(x)·p(pair | x). "cosine" is the inner product alone, in [-1, 1].

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, https://arxiv.org/abs/2303.15343; Tschannen et al.,
    "SigLIP 2", 2025, https://arxiv.org/abs/2502.14786.

    Args:
        model: Of transformers: a hub id or a folder, fixed resolution or NaFlex. Of open_clip: an architecture name (with
            `weights`), a folder with `open_clip_config.json`, or `hf-hub:ID`.
        weights: For an architecture name of open_clip: a local file, or one of its tags, which downloads.
        output: "logit", "log_prob" or "cosine".
        scale: Factor on the score.
        grad: Whether r is differentiable in the images.
        dtype: Of the network.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        model: str = "google/siglip2-base-patch16-224",
        weights: str | None = None,
        *,
        output: Literal["logit", "log_prob", "cosine"] = "logit",
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}: use one of {OUTPUTS}.")
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        check_image_text_model(model, weights, KINDS)
        self.output, self.model, self.weights = output, model, weights

    def _load(self) -> TwoTowers:
        """ValueError where it is no SigLIP."""
        found = image_text_model(self.model, self.weights, KINDS, batch=self.batch, dtype=self.dtype)
        if getattr(found.model, "logit_bias", None) is None:
            raise ValueError(f"{self.model!r} has no logit_bias: it is not a SigLIP model; use clip_score.")
        return found

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        cosines = self.clip.cosines(images, prompts)
        if self.output == "cosine":
            return self.scale * cosines
        logits = self.clip.scale * cosines + self.clip.bias
        return self.scale * (logsigmoid(logits) if self.output == "log_prob" else logits)
