"""A pipeline of a published architecture with random weights: as fast and as large as the real one, and its pictures are noise.

    prior: {component: stable_diffusion, path: "random:sd15", dtype: bfloat16}

Nothing is downloaded. `architectures/` holds the config files of the published folders, and in `embeddings.json` the shapes that
the text encoders would answer with: the text encoders themselves are left out, and each prompt has embeddings drawn from its text.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.files.completeness import read_json

__all__ = ["PREFIX", "is_random", "random_folder", "random_pipeline"]

PREFIX = "random:"
"""What a `path` starts with that asks for random weights."""

ARCHITECTURES = Path(__file__).parent / "architectures"


def is_random(path: str) -> bool:
    """True for "random:NAME"."""
    return path.startswith(PREFIX)


def random_folder(path: str) -> Path:
    """The folder of configs behind "random:NAME" or "random:FOLDER".

    Raises:
        ValueError: there is no such architecture.
    """
    name = path.removeprefix(PREFIX)
    for folder in (ARCHITECTURES / name, Path(name)):
        if name and (folder / "embeddings.json").is_file():
            return folder
    known = ", ".join(sorted(PREFIX + folder.name for folder in ARCHITECTURES.iterdir()))
    raise ValueError(
        f"There is no architecture at path={path!r}. Known: {known}; or {PREFIX} and a diffusers folder that has, beside its "
        'configs, an embeddings.json with the shapes that encode_prompt answers with: {"prompt_embeds": [77, 768]}.'
    )


def random_pipeline(
    pipeline: Any, folder: Path, components: Sequence[str], *, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[Any, str]:
    """Build a diffusers pipeline with random weights, drawn in `dtype` on `device`: no second copy of them is ever made.

    Args:
        pipeline: Class in diffusers.
        folder: See `random_folder`.
        components: The networks of the pipeline; those of diffusers are built, text encoders are not.
        dtype: Of the weights.
        device: Where they are.
        **options: Other parts of the pipeline; what its constructor does not know is ignored.

    Returns:
        The pipeline, frozen and in evaluation mode, and a text in the place of a digest of its weights.
    """
    index = read_json(folder / "model_index.json")
    networks = {
        name: _network(index[name][1], read_json(folder / name / "config.json"), dtype, device)
        for name in components
        if index[name][0] == "diffusers"
    }
    parameters = inspect.signature(pipeline.__init__).parameters
    absent = {name: None for name, it in parameters.items() if name != "self" and it.default is inspect.Parameter.empty}
    settings = {name: value for name, value in index.items() if name in parameters and not isinstance(value, list)}
    pipe = pipeline(**absent | settings | {key: options[key] for key in options if key in parameters} | networks)
    pipe.encode_prompt = _drawn(pipe.encode_prompt, read_json(folder / "embeddings.json"), dtype, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, PREFIX + folder.name


def _network(name: str, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    import diffusers

    with torch.random.fork_rng([device] if device.type == "cuda" else []), _made_in(dtype), device:
        torch.manual_seed(0)
        network = getattr(diffusers, name).from_config(config)
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point():
            value.data = value.data.to(dtype)  # tables of positions are made in float32
    return network.requires_grad_(False).eval()


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _drawn(
    stock: Callable[..., Any], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Callable[..., Any]:
    """`encode_prompt` without text encoders: normal numbers that depend on the text alone; what is encoded already is passed on."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("prompt_embeds") is not None:
            return stock(*args, **kwargs)
        prompts = [given["prompt"]] if isinstance(given["prompt"], str) else list(given["prompt"])
        away = given.get("negative_prompt") or ""
        texts = {True: [away] * len(prompts) if isinstance(away, str) else list(away), False: prompts}
        guided = given.get("do_classifier_free_guidance", True)
        place = given.get("device") or device

        def answer(name: str, shape: Sequence[int]) -> Tensor | None:
            negative = name.startswith("negative_")
            if negative and not guided:
                return None
            if name.endswith("_ids"):  # places of tokens, which text has none of
                return torch.zeros(*shape, dtype=dtype, device=place)
            return torch.stack([_normal(text, shape) for text in texts[negative]]).to(place, dtype)

        return tuple(answer(name, shape) for name, shape in shapes.items())

    return encode_prompt


def _normal(text: str, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(0, text, *shape)))
