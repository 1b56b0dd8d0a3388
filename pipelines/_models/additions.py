"""What users put into a published model before they tune it: another autoencoder, a LoRA that stays, tokens of their own.

All of it belongs to the prior: it is loaded before the posterior's adapters and frozen.

Textual inversion: Gal et al., 2022, https://arxiv.org/abs/2208.01618
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffusion_rtb.files.completeness import LORA, read_json, tensor_shapes
from pipelines._models.proof import prove, weights_of

__all__ = ["Additions"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Additions:
    """An autoencoder, a LoRA and textual inversions, checked by their headers before anything is loaded.

    Args:
        vae: A diffusers folder of an autoencoder that replaces the pipeline's own.
        lora: A LoRA, a .safetensors file or a folder with pytorch_lora_weights.safetensors, that stays part of the prior.
        lora_scale: What its update is multiplied by.
        textual_inversions: Token -> .safetensors file with its embedding.
    """

    vae: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    textual_inversions: Mapping[str, str] = field(default_factory=dict)

    def check(self, pipeline: type) -> None:
        """Refuse what is not there, holds no tensors of its kind, or has no place in this pipeline.

        Raises:
            ValueError: see above.
        """
        for what, given, method in (
            ("lora", self.lora, "load_lora_weights"),
            ("textual_inversions", self.textual_inversions, "load_textual_inversion"),
        ):
            if given and not hasattr(pipeline, method):
                raise ValueError(f"{what}: {pipeline.__name__} has no {method}, so leave {what} out.")
        if self.lora:
            _check_lora_file(self.lora_file)
        elif self.lora_scale != 1:
            raise ValueError(f"lora_scale={self.lora_scale} has no effect without a lora: give lora, or leave it out.")
        for token, file in self.textual_inversions.items():
            _check_inversion(token, Path(file))

    @property
    def lora_file(self) -> Path:
        """The LoRA's file."""
        path = Path(self.lora or "")
        return path / "pytorch_lora_weights.safetensors" if path.is_dir() else path

    def check_fit(self, folder: Path, denoiser: Mapping[str, Shape]) -> None:
        """Refuse additions made for another base model.

        Args:
            folder: Of the base model.
            denoiser: Shapes of its denoiser's weights.

        Raises:
            ValueError: layers have other sizes, or the autoencoder other latents.
        """
        index = read_json(folder / "model_index.json")
        self.check_layers(denoiser)
        if self.vae:
            _check_vae(Path(self.vae), folder, index)
        widths = [read_json(folder / name / "config.json").get("hidden_size") for name in _encoders(index)]
        for token, file in self.textual_inversions.items():
            for shape in tensor_shapes([Path(file)]).values():
                if shape[-1] not in widths:
                    raise ValueError(
                        f"textual_inversions: {token!r} of {file} has {shape[-1]} numbers, and the text encoders of this model "
                        f"{' and '.join(map(str, widths))}: it was learned for another base model."
                    )

    def check_layers(self, denoiser: Mapping[str, Shape]) -> None:
        """Refuse a LoRA whose layers have other sizes than the denoiser's weights; ValueError."""
        if self.lora:
            _check_layers(self.lora_file, denoiser)

    def replaced(self, dtype: torch.dtype) -> dict[str, Any]:
        """Parts to give to the pipeline's `from_pretrained`."""
        if not self.vae:
            return {}
        import diffusers

        cls = getattr(diffusers, read_json(Path(self.vae) / "config.json")["_class_name"])
        return {"vae": cls.from_pretrained(self.vae, torch_dtype=dtype, use_safetensors=True)}

    def add_to(self, pipe: Any) -> None:
        """Load tokens and LoRA into a pipeline; the LoRA is merged into the weights.

        Raises:
            ValueError: the LoRA does not fit, or changes nothing.
        """
        for token, file in self.textual_inversions.items():
            _add_token(pipe, token, Path(file))
        if self.lora:
            self.load_lora(pipe)
            pipe.fuse_lora(lora_scale=self.lora_scale)
            pipe.unload_lora_weights()

    def load_lora(self, pipe: Any) -> None:
        """Load the LoRA into a pipeline by its own loader, as adapters.

        Raises:
            ValueError: it does not fit, or changes nothing.
        """
        try:
            pipe.load_lora_weights(str(self.lora_file.parent), weight_name=self.lora_file.name)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"lora={self.lora!r} does not fit {type(pipe).__name__}: {reason} Use a LoRA that was trained on this base model."
            ) from error
        if not pipe.get_active_adapters():
            raise ValueError(
                f"lora={self.lora!r} has no layer of this {type(pipe).__name__}: use a LoRA of this base model."
            )

    def code(self, dtype: str) -> list[str]:
        """Lines of Python that add them to `pipe`."""
        lines = []
        if self.vae:
            name = read_json(Path(self.vae) / "config.json")["_class_name"]
            lines = [f"from diffusers import {name}"]
            lines += [f"pipe.register_modules(vae={name}.from_pretrained({self.vae!r}, dtype=torch.{dtype}))"]
        lines += [line for token, file in self.textual_inversions.items() for line in _token_code(token, Path(file))]
        if self.lora:
            place = f"{str(self.lora_file.parent)!r}, weight_name={self.lora_file.name!r}"
            lines += [f"pipe.load_lora_weights({place})", f"pipe.fuse_lora(lora_scale={self.lora_scale})"]
            lines += ["pipe.unload_lora_weights()"]
        return lines


def _encoders(index: Mapping[str, Any]) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if (index.get(name) or [None, None])[1]]


def _check_lora_file(file: Path) -> None:
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(
            f"lora: there is no LoRA at {file}. Give a .safetensors file, or a folder with pytorch_lora_weights.safetensors (other "
            "formats are pickles and never read)."
        )
    if not any(LORA.search(name) for name in tensor_shapes([file])):
        raise ValueError(f"lora: {file} holds no LoRA: none of its tensors is named lora_A, lora_down or alike.")


def _check_inversion(token: str, file: Path) -> None:
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(
            f"textual_inversions: there is no .safetensors file at {file} for {token!r} (*.pt and *.bin are pickles and never "
            "read; load one where you trust it and save its tensor with safetensors)."
        )
    shapes = tensor_shapes([file])
    if any(len(shape) not in (1, 2) for shape in shapes.values()) or not 1 <= len(shapes) <= 2:
        raise ValueError(
            f"textual_inversions: {file} is no textual inversion: it holds {len(shapes)} tensors, and one embedding (or, for "
            "SDXL, clip_l and clip_g) is needed."
        )


def _check_layers(file: Path, denoiser: Mapping[str, Shape]) -> None:
    """Hold the inputs of a LoRA's layers against the network's, under diffusers' or kohya's names; others are let through."""
    wanted = {_flat(name.removesuffix(".weight")): shape for name, shape in denoiser.items() if len(shape) > 1}
    for name, shape in tensor_shapes([file]).items():
        layer, _, rest = name.replace(".lora_down.", ".lora_A.").partition(".lora_A.")
        known = wanted.get(_flat(layer))
        if rest and known is not None and shape[1] != known[1]:
            raise ValueError(
                f"lora: {file} is of another base model: its layer {layer} takes {shape[1]} numbers, this model's {known[1]}. Use "
                "a LoRA that was trained on this base model."
            )


def _flat(name: str) -> str:
    """A layer's name as kohya writes it."""
    for start in ("unet.", "transformer.", "lora_unet_", "lora_transformer_"):
        name = name.removeprefix(start)
    return name.replace(".processor", "").replace(".", "_")


def _check_vae(vae: Path, folder: Path, index: Mapping[str, Any]) -> None:
    if not (vae / "config.json").is_file():
        raise ValueError(
            f"vae: {vae} holds no config.json: give a diffusers folder of an autoencoder (vae.save_pretrained)."
        )
    import diffusers

    config, own = read_json(vae / "config.json"), read_json(folder / "vae" / "config.json")
    name, needed = config.get("_class_name"), index["vae"][1]
    if name != needed:
        raise ValueError(f"vae: {vae} holds a {name}, and this pipeline takes a {needed}.")
    made, wanted = (of.get("latent_channels", 4) for of in (config, own))
    if made != wanted:
        raise ValueError(
            f"vae: {vae} has latents of {made} channels, this model of {wanted}: it belongs to another model."
        )
    prove(getattr(diffusers, name), vae, *weights_of(vae, getattr(diffusers, name), None))


PAIR = {"clip_l": "", "clip_g": "_2"}
"""Tensors in a file for SDXL -> which of its two text encoders they are for."""


def _add_token(pipe: Any, token: str, file: Path) -> None:
    found = load_file(file)
    if set(found) != set(PAIR):
        pipe.load_textual_inversion({token: next(iter(found.values()))}, token=token)
        return
    for key, end in PAIR.items():
        encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
        pipe.load_textual_inversion({token: found[key]}, token=token, text_encoder=encoder, tokenizer=tokenizer)


def _token_code(token: str, file: Path) -> list[str]:
    if set(tensor_shapes([file])) != set(PAIR):
        return [f"pipe.load_textual_inversion({str(file)!r}, token={token!r})"]
    return ["from safetensors.torch import load_file", f"found = load_file({str(file)!r})"] + [
        f'pipe.load_textual_inversion({{{token!r}: found["{key}"]}}, token={token!r}, text_encoder=pipe.text_encoder{end}, '
        f"tokenizer=pipe.tokenizer{end})"
        for key, end in PAIR.items()
    ]
