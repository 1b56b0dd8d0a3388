"""Any text-to-image pipeline of diffusers as a `Prior`: prompts by its own `encode_prompt`, guidance, sizes.

Which prior is tilted with classifier-free guidance, and which without, is in `pipelines._diffusers.guidance`.

DDIM and eta: Song et al., 2020, https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

from jaxtyping import Float
from torch import Tensor

from pipelines._diffusers.embeddings import PromptEmbeddings
from pipelines._diffusers.guidance import Guidance, TiltedPrior
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._diffusers.settings import PriorSettings, check_size
from pipelines._models.kept_embeddings import KeptEmbeddings
from pipelines._models.lengths import say_what_is_cut
from pipelines._models.memory import Memory

__all__ = ["MASKED", "TextToImage"]

MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
"""What `encode_prompt` answers where a mask says which tokens are padding."""


class TextToImage(DiffusersPrior):
    """A folder of diffusers that draws what a prompt says; the constructor checks all it can, and weights load at first use.

    Args:
        path: A diffusers folder, a hub id, the name of a bundled prior, or "random:NAME" for random weights of a published
            architecture; by default the family's `published` model.
        steps: Denoising steps T; 50 by default.
        timesteps: Instead of `steps` the timesteps themselves, falling, where the scheduler takes them (DDPMScheduler). More of
            them where the reward is decided: a Gaussian can follow the tilt of a transition only if it decides little.
        guidance: Classifier-free guidance scale g >= 1, the same for prior and posterior; 1 is none.
        tilted_prior: States which prior is tilted, "guided" (needs guidance > 1) or "unguided" (needs guidance 1). The
            default follows from `guidance`; stating it turns a later change of `guidance` into an error.
        eta: Noise level in (0, 1] of schedulers that have one (DDIM). 1 is the DDPM posterior variance. Below 1 the chain
            is not memoryless: x_0 depends on x_T, and one log Z per prompt cannot fit.
        scheduler: Class name in diffusers; the family's `sampler` by default. It keeps the pipeline's own noise schedule.
        scheduler_arguments: Constructor arguments of the scheduler that differ from the pipeline's.
        negative_prompt: What guidance moves away from; by default what the pipeline itself takes without one.
        dtype: Of the frozen networks: "float32", "float16" or "bfloat16". Adapters are always float32.
        device: Where to run, such as "cpu" or "cuda:1"; accelerate's choice by default.
        memory: What it may do to take less memory: gradient_checkpointing, offload, vae_tiling, embeddings; see `Memory`.
        speed: How its denoiser is computed: compile, channels_last, attention, tf32; see `Speed`.
        height: Image height in pixels, a multiple of the family's `multiple`, together with `width`; the model's own by default.
        width: Image width in pixels.
        max_sequence_length: Tokens of a prompt that a large text encoder (T5, a language model) reads, where the pipeline can be
            told; its own limit by default. Longer prompts are cut, shorter ones mostly padded to it.
        decode_batch: Images the autoencoder decodes at once.
        variant: Of the weight files, as in `from_pretrained`; by default the plain ones or, where there are none, "fp16".
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: a setting is out of range, the sampler is deterministic, or the folder is incomplete, damaged or of
            another kind.
    """

    embeds: Sequence[str | None]
    """What `encode_prompt` answers, by the names of the call's arguments; None for what is not passed on."""
    encode: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `encode_prompt` that the call does not have; those it has are taken from the call."""
    call: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's call."""
    guidance_argument: str | None = "guidance_scale"
    """The argument of the call that turns the second branch of classifier-free guidance on; None: it has no such argument."""
    no_negative: ClassVar[str | None] = None
    """The negative prompt where none is given; None leaves it to the pipeline."""
    multiple: ClassVar[int] = 8
    """Of which height and width must be one."""

    def __init__(
        self,
        path: str | None = None,
        *,
        guidance: float = 1.0,
        tilted_prior: TiltedPrior | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        **settings: Unpack[PriorSettings],
    ) -> None:
        negative = self.no_negative if negative_prompt is None and guidance > 1 else negative_prompt
        self.guidance = Guidance(guidance, tilted_prior, negative)
        check_size(height, width, self.multiple)
        self._size = {"height": height, "width": width} if height and width else {}
        self._call = dict(self.call) | self._length(max_sequence_length)
        options = {name: value for name, value in self._call.items() if name != "negative_prompt"} | dict(self.encode)
        self._prompts: list[str] = []
        folder = (settings.get("memory") or Memory()).embeddings
        kept = None if folder is None else KeptEmbeddings(Path(folder))
        self._embeddings = PromptEmbeddings(self.embeds, options, guidance > 1, negative, kept)
        super().__init__(path or self.published, **settings)

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Say which prompts are longer than what the text encoders read; of a hub id, once it has been fetched."""
        self._prompts = list(prompts)
        if self._model.here:
            self._say_what_is_cut()

    def load_weights(self) -> None:
        """Load the pipeline; see `DiffusersPrior`."""
        fetched = not self._model.here
        super().load_weights()
        if fetched:
            self._say_what_is_cut()

    def _say_what_is_cut(self) -> None:
        folder = self._model.find()[0]
        say_what_is_cut(folder, self.pipeline, self.parts.vocabularies, self._call | dict(self.encode), self._prompts)

    def _length(self, tokens: int | None) -> dict[str, int]:
        """The limit of a prompt's length as an argument of the call.

        Raises:
            ValueError: it is below 1, or this pipeline has no such argument.
        """
        import diffusers

        if tokens is None:
            return {}
        if tokens < 1:
            raise ValueError(f"max_sequence_length={tokens} must be at least 1.")
        if "max_sequence_length" not in inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters:
            raise ValueError(
                f"max_sequence_length={tokens}: {self.pipeline} takes none, its text encoders have a fixed length. Leave it out."
            )
        return {"max_sequence_length": tokens}

    def settings(self) -> dict[str, Any]:
        """Steps, eta, guidance, size and length, as arguments of the pipeline's call."""
        return super().settings() | self._call | self.guidance.settings(self.guidance_argument) | self._size

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts: embeddings, guidance, steps, eta, size."""
        settings = self.settings()
        if "negative_prompt" in settings:
            settings["negative_prompt"] = None  # its embeddings are given, and pipelines refuse both
        return settings | self._embeddings(self.pipe, prompts, self.device)

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Mean of each prompt's token embeddings, float32, detached."""
        return self._embeddings.mean(self._embeddings(self.pipe, prompts, self.device))

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, the guidance too."""
        length = {name: value for name, value in self._call.items() if name == "max_sequence_length"}
        return super().fingerprint() | length | {"guidance": self.guidance.fingerprint()}
