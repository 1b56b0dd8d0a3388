"""Checkpoints of Stable Diffusion in one .safetensors file, under the names of its first implementation.

    prior: {component: stable_diffusion, path: models/some_checkpoint.safetensors}

Such a file holds weights and nothing else, so the configs come from a diffusers folder of its architecture: those of Stable
Diffusion 1.5 and SDXL come with this package, CLIP's vocabulary with open_clip. Nothing is fetched. That a checkpoint predicts v
instead of noise is not in the file: say `scheduler_arguments: {prediction_type: v_prediction}`.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.files.completeness import check_names, read_json, refuse_lora, tensor_shapes
from pipelines._models.proof import quiet

__all__ = ["check_single_file", "configs_for", "is_single_file", "read_single_file"]

ARCHITECTURES = Path(__file__).parent / "architectures"

Shapes = Mapping[str, tuple[int, ...]]

MARKS = {
    "conditioner.embedders.1.": ("SDXL", "stable_diffusion_xl", "sdxl"),
    "cond_stage_model.transformer.": ("Stable Diffusion 1.x", "stable_diffusion", "sd15"),
    "cond_stage_model.model.": ("Stable Diffusion 2.x", "stable_diffusion", None),
    "conditioner.embedders.0.": ("the SDXL refiner", None, None),
    "model.diffusion_model.joint_blocks.": ("Stable Diffusion 3", "stable_diffusion_3", None),
    "double_blocks.": ("FLUX", "flux", None),
    "model.diffusion_model.double_blocks.": ("FLUX", "flux", None),
}
"""How tensors of a checkpoint begin -> what it is, the component for it, and its bundled configs."""


def is_single_file(path: str) -> bool:
    """True for a path that means one file of weights."""
    return path.endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def configs_for(file: Path, pipeline: str, config: str | None) -> Path:
    """The folder with the configs of a checkpoint's architecture.

    Args:
        file: The checkpoint.
        pipeline: Class of diffusers that is to be made of it.
        config: The folder, where the bundled ones will not do.

    Raises:
        ValueError: there is no such file, it is a pickle, a LoRA or one network alone, or of another pipeline.
    """
    if file.suffix != ".safetensors":
        raise ValueError(
            f"path={str(file)!r}: {file.suffix} files are pickles, which run code when they are read. Give a .safetensors file, "
            "or a diffusers folder."
        )
    if not file.is_file():
        raise ValueError(
            f"There is no checkpoint at path={str(file)!r}: give a .safetensors file, or a diffusers folder."
        )
    names = tensor_shapes([file])
    refuse_lora(names, file)
    what, component, bundled = next(
        (found for mark, found in MARKS.items() if _begins(names, mark)), (None, None, None)
    )
    if what is None:
        raise ValueError(
            f"{file} is no checkpoint of a whole model (first tensor: {min(names)}): it must hold denoiser, text encoder and "
            "autoencoder under the names of their first implementation. One network alone belongs into a diffusers folder."
        )
    folder = Path(config) if config else ARCHITECTURES / bundled if bundled else None
    if folder is None:
        raise ValueError(
            f"{file} is a checkpoint of {what}, whose configs do not come with this package: give config, a diffusers folder of "
            "its architecture (its weights are not needed), or a whole diffusers folder as path."
        )
    if (named := read_json(folder / "model_index.json").get("_class_name")) != pipeline:
        hint = f" Choose component: {component}." if component else ""
        raise ValueError(f"{file} is a checkpoint of {what} ({named}); this prior needs a {pipeline}.{hint}")
    return folder


def _begins(names: Shapes, mark: str) -> bool:
    return any(name.startswith(mark) for name in names)


def check_single_file(file: Path, folder: Path) -> Shapes:
    """Hold denoiser and autoencoder of a checkpoint against their architecture, without loading; the denoiser's shapes.

    Raises:
        ValueError: tensors are missing, or of other shapes.
    """
    import diffusers
    from diffusers.loaders import single_file_utils as ldm

    index = read_json(folder / "model_index.json")
    converted: dict[str, Shapes] = {}
    for part, convert in (("unet", ldm.convert_ldm_unet_checkpoint), ("vae", ldm.convert_ldm_vae_checkpoint)):
        config = read_json(folder / part / "config.json")
        state: Any = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes([file]).items()}
        cls = getattr(diffusers, index[part][1])
        with torch.device("meta"), quiet():
            wanted = {name: tuple(value.shape) for name, value in cls.from_config(config).state_dict().items()}
        what = f"{part} ({cls.__name__})"
        try:
            found = convert(state, dict(config))
        except KeyError as error:
            raise ValueError(
                f"{file} lacks {error} of its {what}: the file is cut off, or of another architecture than {folder}."
            ) from error
        converted[part] = {name: _shape(name, value) for name, value in found.items()}
        check_names(converted[part], wanted, file, what)
    return converted["unet"]


def _shape(name: str, value: Tensor) -> tuple[int, ...]:
    """Attention of the autoencoder is stored as convolutions of one pixel."""
    shape = tuple(value.shape)
    attention = ".attentions." in name and any(
        f".{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0")
    )
    return shape[:2] if attention and len(shape) == 4 else shape


def read_single_file(
    pipeline: Any, file: Path, folder: Path, *, dtype: torch.dtype, scheduler: Any, **options: Any
) -> Any:
    """The pipeline.

    Args:
        pipeline: Class of diffusers.
        file: The checkpoint.
        folder: With the configs.
        dtype: Of the weights.
        scheduler: The pipeline's.
        **options: Other parts of the pipeline, and arguments of its constructor.

    Raises:
        ValueError: a text encoder of it is incomplete.
    """
    index = read_json(folder / "model_index.json")
    tokenizers = {
        name: _clip_tokenizer(pad="!" if name == "tokenizer_2" else "<|endoftext|>")
        for name in ("tokenizer", "tokenizer_2")
        if index.get(name) and not (folder / name).is_dir()
    }
    with quiet():
        pipe = pipeline.from_single_file(
            str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, scheduler=scheduler, **tokenizers, **options
        )  # fmt: skip
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, network in networks.items():
        if empty := [key for key, value in network.named_parameters() if value.is_meta]:
            raise ValueError(f"{file} lacks {len(empty)} tensors of {name} (first: {empty[0]}): the file is cut off.")
    return pipe


def _clip_tokenizer(pad: str) -> Any:
    """CLIP's own byte-pair tokenizer, from the vocabulary that open_clip carries."""
    import open_clip
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [(a, b) for a, b in (line.split() for line in text.split("\n")[1 : 49152 - 256 - 2 + 1])]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)
