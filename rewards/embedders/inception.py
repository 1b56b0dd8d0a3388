"""The space of the standard FID and KID: InceptionV3 as torch-fidelity carries it; no reward."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.files.completeness import check_finite
from rewards._models.weights import check_weights, read_weights

__all__ = ["Inception"]


class Inception(TwoPhase):
    """Features of InceptionV3 with TensorFlow's weights of 2015, on 8-bit images: with `frechet` the FID, with `kid` the KID.

    Numbers are those of torch-fidelity (extra `fid`), which reproduce the published code's. The weights, 91 MB, are downloaded to
    torch's hub folder when they are first needed.

    Obukhov et al. 2020, https://github.com/toshas/torch-fidelity; Heusel et al. 2017, https://arxiv.org/abs/1706.08500

    Args:
        layer: Number of features: 2048 is the published one.
        weights: The file, if it is on this machine: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.
        batch: Images per network call. Memory, not results.

    Raises:
        ValueError: torch-fidelity is not installed.
    """

    def __init__(
        self, layer: Literal["64", "192", "768", "2048"] = "2048", weights: str | None = None, *, batch: int = 64
    ) -> None:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError(
                "The embedder 'inception' needs torch-fidelity, which is not installed: pip install 'diffusion-rtb[fid]' "
                "(or pip install torch-fidelity). `features` and `clip_score` do without."
            )
        if batch < 1:
            raise ValueError(f"batch is {batch}: at least 1 image per network call.")
        if weights is not None:
            check_weights(weights)
        self.layer, self.weights, self.batch = layer, weights, batch

    @cached_property
    def network(self) -> Any:
        """torch-fidelity's extractor, loaded."""
        from torch_fidelity import feature_extractor_inceptionv3 as published

        # torch-fidelity unpickles whatever the file holds, so it gets one that was seen to hold tensors alone.
        if self.weights is None:
            torch.hub.load_state_dict_from_url(published.URL_INCEPTION_V3, weights_only=True, check_hash=True)
            path = str(Path(torch.hub.get_dir(), "checkpoints", published.URL_INCEPTION_V3.rpartition("/")[2]))
        else:
            path = self.weights
        check_finite(read_weights(path), path)
        extractor = published.FeatureExtractorInceptionV3
        return extractor("inception-v3-compat", [self.layer], feature_extractor_weights_path=path)

    def load_weights(self) -> None:
        _ = self.network

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The layer's mean over pixels of each image in [0, 1], on its device; NaN of an image with a NaN."""
        network = self.network.to(images.device)
        levels = (images.clamp(0, 1) * 255).round().nan_to_num(0.0).to(torch.uint8)
        found = torch.cat([network(part)[0] for part in levels.split(self.batch)])
        return found + 0 * images.sum((1, 2, 3))[:, None]
