r"""Class-conditional diffusion transformers as prior and posterior: a stock `DiTPipeline`, made stochastic, with a LoRA.

A prompt is a class: its number, or one of the names that model_index.json has for it ("white shark"). With guidance scale g > 1

    e_g(x_t) = e(x_t, no class) + g · (e(x_t, class) - e(x_t, no class))

The stock loop does this by stepping on the batch twice and throwing half of it away. Here the network does it: its forward
answers e_g for the batch as it is, and the pipeline is called with guidance 1. The chain is the same, so an exported posterior
is sampled by the plain pipeline at g (`pipelines._diffusers.guidance` has which prior is tilted).

Peebles and Xie, 2022, https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.guidance import Guidance, TiltedPrior
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._diffusers.settings import PriorSettings, check_plain
from pipelines._models.proof import Parts

__all__ = ["DiT"]

NO_CLASS = 1000
"""The class that the stock pipeline takes for none."""


class DiT(DiffusersPrior):
    """A class-conditional latent model as a `Prior`; what it predicts of the variance is dropped, as by its pipeline.

    Args:
        path: A diffusers folder or a hub id.
        guidance: Classifier-free guidance scale g >= 1, the same for prior and posterior; 1 is none.
        tilted_prior: States which prior is tilted, "guided" or "unguided"; see `TextToImage`.
        **settings: See `DiffusersPrior`. The scheduler, DDPMScheduler by default, must have no eta, as the pipeline passes none
            on, and not scale its states.

    Raises:
        ValueError: a setting is out of range, the sampler is deterministic or scales its states, or the folder is incomplete,
            damaged or of another kind.
    """

    family = "dit"
    pipeline = "DiTPipeline"
    published = "facebook/DiT-XL-2-256"
    parts = Parts(("vae", "transformer"))
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "DDPMScheduler"
    sampler_settings: ClassVar = {"clip_sample": False}
    any_prompt = "0"

    def __init__(
        self,
        path: str = published,
        *,
        guidance: float = 1.0,
        tilted_prior: TiltedPrior | None = None,
        **settings: Unpack[PriorSettings],
    ) -> None:
        self.guidance = Guidance(guidance, tilted_prior)
        self.labels: dict[str, int] = {}
        self.classes: int | None = None
        super().__init__(path, **settings)

    def check_files(self, folder: Path) -> None:
        """Learn the classes; refuse guidance where the pipeline's "no class" is none of the network's."""
        where = folder / "transformer" / "config.json"
        self.classes = int(read_json(where).get("num_embeds_ada_norm") or NO_CLASS)
        named = read_json(folder / "model_index.json").get("id2label") or {}
        self.labels = {label.strip(): int(key) for key, names in named.items() for label in names.split(",")}
        if self.guidance.scale > 1 and self.classes != NO_CLASS:
            raise ValueError(
                f"guidance={self.guidance.scale}, but {where} has {self.classes} classes, and the stock pipeline takes number "
                f"{NO_CLASS} for none. Set guidance: 1.0."
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """The pipeline's first state is not scaled, and it passes no eta on."""
        check_plain(scheduler, self.pipeline, eta=False)

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Refuse prompts that are no class; those of a hub id that is not fetched yet are looked at when they are drawn."""
        for prompt in prompts if self.classes is not None else ():
            self.class_of(prompt)

    def class_of(self, prompt: str) -> int:
        """The number of the class that a prompt names.

        Raises:
            ValueError: it names none.
        """
        text, last = prompt.strip(), (self.classes or NO_CLASS) - 1
        number = int(text) if text.isdecimal() else self.labels.get(text)
        if number is None or number > last:
            known = f", or one of the {len(self.labels)} names in its model_index.json" if self.labels else ""
            raise ValueError(
                f"The prompt {prompt!r} is no class of this model: give a number from 0 to {last}{known}."
                f"{nearest(text, self.labels)}"
            )
        return number

    def load_weights(self) -> None:
        """Load the pipeline, and have its network guide itself where there is guidance."""
        if self._pipe is None:
            super().load_weights()
            if self.guidance.scale > 1:
                guide(self.network, self.guidance.scale, self.network.config.in_channels)

    def settings(self) -> dict[str, Any]:
        """Steps and guidance, as arguments of the plain pipeline's call."""
        return super().settings() | self.guidance.settings("guidance_scale")

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these classes; its network guides itself."""
        classes = [self.class_of(prompt) for prompt in prompts]
        return self.settings() | {"class_labels": classes, "guidance_scale": 1.0, "output_type": "pt"}

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """The embedding of each prompt's class, float32, detached."""
        table = self.network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        classes = torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.device)
        embedded: Tensor = table(classes)
        return embedded.detach().float()

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, the guidance too."""
        return super().fingerprint() | {"guidance": self.guidance.fingerprint()}

    def snippet(self, folder: str = "path/to/this/folder", prompt: str = "207") -> str:
        """Python that samples an exported posterior with plain diffusers; its pipeline gives the scheduler no generator."""
        return super().snippet(folder, prompt).replace("\nimage = ", "\ntorch.manual_seed(0)  # of the steps\nimage = ")

    def as_written(self, prompt: str) -> str:
        """The class by its number."""
        return f"class_labels=[{self.class_of(prompt)}]"


def guide(network: nn.Module, scale: float, channels: int) -> None:
    """Have a class-conditional network answer e_g, from one evaluation on twice the batch; what it says of the variance stays.

    Args:
        network: Called as by `DiTPipeline`, with the states, `timestep` and `class_labels`.
        scale: g.
        channels: Of its answer that are e.
    """

    def both(module: nn.Module, args: Any, kwargs: Any) -> Any:
        (x,), classes = args, kwargs["class_labels"]
        labels = torch.cat([classes, torch.full_like(classes, NO_CLASS)])
        return (torch.cat([x, x]),), kwargs | {"timestep": torch.cat([kwargs["timestep"]] * 2), "class_labels": labels}

    def one(module: nn.Module, args: Any, output: Any) -> Any:
        with_class, without = output.sample.chunk(2)
        e, e_0 = with_class[:, :channels], without[:, :channels]
        return type(output)(sample=torch.cat([e_0 + scale * (e - e_0), with_class[:, channels:]], dim=1))

    network.register_forward_pre_hook(both, with_kwargs=True)
    network.register_forward_hook(one)
