"""Any other pipeline of diffusers as prior and posterior: what no family file says is looked up, or said in the config.

    prior:
      component: auto
      path: my/controlnet-folder                # written by save_pretrained
      call: {controlnet_conditioning_scale: 0.8}
    prompts: {file: prompts.jsonl}              # {"prompt": "a cat", "image": "cat_edges.png"}

From model_index.json and the signature of the pipeline's call: the class, its parts, the trained network (transformer, unet or
prior), the sampler (flows: `FlowMatchSDEScheduler`; else DDIM with eta 1 where the call takes eta, DDPM where not), the
guidance argument (`true_cfg_scale`, else `guidance_scale`), what `encode_prompt` answers, and which pictures the call takes
with a prompt.

*Pictures* are columns of the prompt file, and belong to the prior: image-to-image starts from one, ControlNet follows one,
inpainting fills one in (with a network of 9 channels: one of 4 has its latents changed after each step, and is refused when it
samples). They are encoded at the mean of the autoencoder's posterior, whose small spread the stock call draws anew each time.

A pipeline that the recorder cannot follow is refused in the first iteration, and one that does not repeat itself by the parity
check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.abilities import Entry
from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.conditions import PICTURES, EncodedOnce, Pictures
from pipelines._diffusers.embeddings import PromptEmbeddings
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.scheduler import takes_eta
from pipelines._diffusers.settings import TextSettings
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.looked_up import answered, call_names, parts_of, pipeline_class, predicts_flow, unloaded
from pipelines._models.proof import Parts

__all__ = ["Auto"]

OWN = {
    "prompt": "prompts",
    "negative_prompt": "prior.negative_prompt",
    "num_inference_steps": "prior.steps",
    "timesteps": "prior.timesteps",
    "eta": "prior.eta",
    "guidance_scale": "prior.guidance, unless the pipeline has true_cfg_scale",
    "true_cfg_scale": "prior.guidance",
    "height": "prior.height",
    "width": "prior.width",
    "generator": "seed",
    "latents": "seed",
    "output_type": "nothing: the prior says it",
    "return_dict": "nothing: the prior says it",
    "num_images_per_prompt": "train.group",
    "num_videos_per_prompt": "train.group",
}
"""Arguments of a call that other settings decide, and which."""


class Auto(TextToImage):
    """A folder of any pipeline that is called with prompts, or with nothing, as a `Prior`.

    Args:
        path: A diffusers folder or a hub id.
        pipeline: Class in diffusers; by default the one that model_index.json names. Another one of the same parts may be given,
            such as StableDiffusionImg2ImgPipeline for a folder of a StableDiffusionPipeline.
        denoiser: The network that is trained, by its name in the folder.
        call: Further arguments of the call, the same for all prompts.
        images: Argument of the call -> column of the prompt file with its picture; by default image, mask_image and control_image,
            as far as the call has them, under their own names. {} for none.
        embeds: What `encode_prompt` answers, by the names of the call's arguments (null for what is not passed on); by default
            what its code says. []: each call encodes the prompts anew.
        entry: How a recorded chain is replayed, "latents", "noise" or "step", see `replay`; "step" where pictures come with the
            prompts and the call takes no latents.
        **settings: See `TextToImage`.

    Raises:
        ValueError: see `TextToImage`; or the pipeline has no such argument, part or network.
    """

    family = "auto"
    pipeline = ""
    parts = Parts(())
    denoiser = ""
    targets = ATTENTION
    embeds: Sequence[str | None] = ()

    def __init__(
        self,
        path: str,
        *,
        pipeline: str | None = None,
        denoiser: str | None = None,
        call: Mapping[str, Any] | None = None,
        images: Mapping[str, str] | None = None,
        embeds: Sequence[str | None] | None = None,
        entry: Entry | None = None,
        **settings: Unpack[TextSettings],
    ) -> None:
        self._given: dict[str, Any] = {"pipeline": pipeline, "denoiser": denoiser, "images": images, "embeds": embeds}
        self._given |= {"scheduler": settings.get("scheduler"), "entry": entry}
        self._negative = settings.get("negative_prompt")
        length = settings.pop("max_sequence_length", None)  # which classes take one is not known yet
        call = dict(call or {}) | ({} if length is None else {"max_sequence_length": length})
        self._told: tuple[Sequence[str], Sequence[Mapping[str, Any]], Path] = ((), (), Path())
        self.pictures = Pictures(images or {})
        vars(self).update(call=call)  # of a class elsewhere
        self.pipeline = pipeline or "DiffusionPipeline"
        pipeline_class(self.pipeline)
        super().__init__(path, **settings)

    def read_index(self, folder: Path) -> Sequence[str]:
        """Look up what the config does not say."""
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        named = str(index.get("_class_name"))
        self.pipeline = self._given["pipeline"] or named
        cls = pipeline_class(self.pipeline)
        self.parts, self.without = parts_of(index, cls, folder), unloaded(cls)
        self.denoiser = self._trained(folder)
        self._look_up_call(cls)
        flow = predicts_flow(folder)
        self.predicts = "flow_prediction" if flow else "epsilon"
        vars(self).update(
            options={"requires_safety_checker": False} if self.without else {},
            sampler_settings={"clip_sample": False} if "vae" in self.parts.networks else {},
        )
        if self._given["scheduler"] is None:
            noise = "DDIMScheduler" if "eta" in call_names(cls) else "DDPMScheduler"
            self._scheduler = ("FlowMatchSDEScheduler" if flow else noise, self._scheduler[1])
        return (named,)

    def _trained(self, folder: Path) -> str:
        known = self.parts.networks
        wanted = (self._given["denoiser"],) if self._given["denoiser"] else ("transformer", "unet", "prior")
        found: str | None = next((name for name in wanted if name in known), None)
        if found is None:
            what = f"{folder} has no network {' or '.join(wanted)}"
            raise ValueError(
                f"{what}; it has {', '.join(known) or 'none'}. Set denoiser to the one that is to be trained."
            )
        return found

    def _look_up_call(self, cls: Any) -> None:
        """The arguments of the call: guidance, pictures, embeddings."""
        names = call_names(cls)
        for name in self.call:
            if name in OWN and not (name == "guidance_scale" and "true_cfg_scale" in names):
                raise ValueError(f"call.{name}: that is decided by {OWN[name]}. Take it out of call.")
        self._check_names("call", self.call, names, cls)
        self.guidance_argument = next((name for name in ("true_cfg_scale", "guidance_scale") if name in names), None)
        if self.guidance_argument is None and self.guidance.scale > 1:
            raise ValueError(f"guidance={self.guidance.scale}, but {cls.__name__} takes none. Set guidance: 1.0.")
        columns = self._given["images"]
        if columns is None:
            columns = {name: name for name in PICTURES if name in names and name not in self.call}
        self._check_names("images", columns, names, cls)
        if self.pictures.columns != columns:
            self.pictures = Pictures(columns)
        self.embeds = answered(cls) if self._given["embeds"] is None else self._given["embeds"]
        self._embeddings = PromptEmbeddings(self.embeds, self.call, self.guidance.scale > 1, self._negative)

    def _check_names(self, where: str, given: Mapping[str, Any], names: Sequence[str], cls: Any) -> None:
        for name in given:
            if name not in names:
                raise ValueError(
                    f"{where}: the call of {cls.__name__} has no argument {name!r}.{nearest(name, names)} "
                    f"It has {', '.join(names)}."
                )

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a sampler with eta for a call that passes none on."""
        if takes_eta(scheduler) and "eta" not in call_names(pipeline_class(self.pipeline)):
            raise ValueError(
                f"{type(scheduler).__name__} takes eta, which {self.pipeline} does not pass on: choose DDPMScheduler, or leave "
                "scheduler out."
            )

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Learn the pictures of a run's prompts; those of a hub id that is not fetched yet are named by `images`."""
        self.any_prompt = prompts[0]
        self._told = prompts, metadata, folder
        self.pictures.read(prompts, metadata, folder)

    def load_weights(self) -> None:
        """Load the pipeline; its autoencoder answers means where pictures come with the prompts."""
        if self._pipe is not None:
            return
        super().load_weights()
        vae: Any = getattr(self.pipe, "vae", None)
        if self.pictures.columns and not any(self.pictures.files.values()):  # of a hub id: what it takes is known now
            self.pictures.read(*self._told)
        if self.pictures.columns and hasattr(vae, "encode"):
            vae.encode = EncodedOnce(vae)

    @property
    def entry(self) -> Entry | None:
        """How a recorded chain is replayed; None: as the call takes it."""
        given: Entry | None = self._given["entry"]
        starts = bool(self.pictures.columns) and "latents" not in call_names(type(self.pipe))
        return "step" if given is None and starts else given

    @property
    def loop_networks(self) -> Sequence[nn.Module]:
        """The trained network, and a ControlNet beside it."""
        beside = [getattr(self.pipe, name) for name in self.parts.networks if name == "controlnet"]
        return (self.network, *beside)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts: embeddings or texts, pictures, and what the config says."""
        names, pictures = call_names(type(self.pipe)), self.pictures.of(prompts)
        if self.embeds:
            return super().arguments(prompts) | pictures
        settings = self.settings()
        if "prompt" in names:
            settings["prompt"] = list(prompts)
        elif "batch_size" in names:
            settings["batch_size"] = len(prompts)
        if settings.get("negative_prompt") is not None:
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
        return settings | pictures

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Mean of each prompt's token embeddings, where they are known; else nothing."""
        return super().features(prompts) if self.embeds else torch.zeros(len(prompts), 0, device=self.device)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the pipeline, its arguments and its pictures too."""
        own = {"pipeline": self.pipeline, "denoiser": self.denoiser, "call": dict(self.call)}
        return super().fingerprint() | own | {"pictures": self.pictures.digests()}

    def as_written(self, prompt: str) -> str:
        """The prompt, if the call takes one, and its pictures."""
        files = {argument: found.get(prompt) for argument, found in self.pictures.files.items()}
        shown = [f"{name}=load_image({str(file or 'picture.png')!r})" for name, file in files.items()]
        return ", ".join([*([f"prompt={prompt!r}"] if "prompt" in call_names(type(self.pipe)) else []), *shown])

    def snippet(self, folder: str = "path/to/this/folder", prompt: str = "a cat") -> str:
        """Python that samples an exported posterior with plain diffusers."""
        code = super().snippet(folder, prompt)
        used = "load_image(" in code
        return (
            code.replace("import torch\n", "import torch\nfrom diffusers.utils import load_image\n", 1)
            if used
            else code
        )
