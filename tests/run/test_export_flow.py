"""The exported card of a flow samples in a process that has only the scheduler of this package; its window is kept there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts
from tests.oracles.families.stable_diffusion_3 import build

ROOT = Path(__file__).parents[2]
ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"}

CHECK = """
torch.manual_seed(0)
again = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
from safetensors.torch import save_file
import sys
assert not {"pipelines", "rewards", "diffusion_rtb.chain"} & set(sys.modules)
save_file({"image": again}, "image.safetensors")
"""


class Three(TextToImage):
    """Stable Diffusion 3, of a test's own."""

    family = "three"
    pipeline = "StableDiffusion3Pipeline"
    parts = Parts(("vae", "transformer", *ENCODERS.values()), ENCODERS)
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    without = ("image_encoder", "feature_extractor")


def image(prior: Any, as_prior: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad(), TrajectoryRecorder(prior.pipe.scheduler, prior=as_prior):
        call = prior.arguments(["a cat"]) | {"output_type": "pt"}
        found: Tensor = prior.pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return found


def test_the_snippet_of_a_flow_draws_the_same_image(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "three")
    arguments = {"kernel": "posterior", "window": [0, 2]}
    prior = Three(str(tmp_path / "three"), steps=4, device="cpu", scheduler_arguments=arguments)
    prior.attach(rank=2, alpha=3.0)
    for parameter in prior.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    out = tmp_path / "lora"
    code = prior.snippet(str(out), "a cat")
    prior.export(out, code)
    (tmp_path / "plain.py").write_text(code + CHECK)
    subprocess.run(
        [sys.executable, "plain.py"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    plain = load_file(tmp_path / "image.safetensors")["image"]
    torch.testing.assert_close(plain, image(prior, prior.as_prior), atol=1e-5, rtol=0)
    with prior.as_prior():
        assert float((plain - image(prior, prior.as_prior)).abs().max()) > 0.01
    assert float((plain - image(prior, None)).abs().max()) > 0.01, "the window matters"
