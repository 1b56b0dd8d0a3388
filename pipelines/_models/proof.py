"""Prove that a diffusers folder is whole before any of its weights is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.files.completeness import (
    check_names,
    check_transformers,
    read_json,
    refuse_lora,
    tensor_shapes,
    weight_files,
)
from diffusion_rtb.files.vocabulary import check_rows, load_tokenizer

__all__ = ["Parts", "check_folder", "network_files", "prove", "quiet", "read_scheduler_config", "weights_of"]

SCHEDULER = Path("scheduler", "scheduler_config.json")


@dataclass(frozen=True)
class Parts:
    """What a kind of pipeline is made of, by the names of the sub-folders."""

    networks: Sequence[str]
    """Those whose weights must be complete."""
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    """Tokenizer -> the network whose embeddings must have a row for each of its tokens."""
    optional: Sequence[str] = ()
    """Those of both that a folder may leave out, where its model_index.json says null."""

    def here(self, index: Mapping[str, Any]) -> Parts:
        """Those that a model_index.json has."""
        gone = {name for name in self.optional if (index.get(name) or [None, None])[1] is None}
        vocabularies = {name: network for name, network in self.vocabularies.items() if not {name, network} & gone}
        return Parts([name for name in self.networks if name not in gone], vocabularies)


def check_folder(
    folder: Path,
    pipelines: Sequence[str],
    parts: Parts,
    variant: str | None = None,
    check_files: Callable[[Path], None] = lambda folder: None,
    *,
    weights: bool = True,
) -> str | None:
    """Prove that a diffusers folder holds this kind of pipeline, whole: every tensor of every network, and the vocabulary.

    Args:
        folder: Holds model_index.json and one sub-folder per component.
        pipelines: Class names of which model_index.json must name one.
        parts: What must be complete.
        variant: Of the weight files, such as "fp16"; None takes the plain ones, or else "fp16".
        check_files: Asked, once all files are found, whether the parts fit each other.
        weights: Without, only the configs are looked at: the folder of an architecture has nothing else.

    Returns:
        The variant to ask diffusers for.

    Raises:
        ValueError: something is missing, truncated, damaged, under other names, or of another kind.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no model_index.json: it is not a diffusers pipeline folder (pipe.save_pretrained writes one)."
        )
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in pipelines:
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')}; this prior needs a {' or '.join(pipelines)}. "
            "Choose another `component` for it, or another `path`."
        )
    if not (folder / SCHEDULER).is_file():
        raise ValueError(f"{folder} holds no {SCHEDULER}, which has the model's noise schedule.")
    parts = parts.here(index)
    classes = {name: _class(folder, index, name) for name in (*parts.networks, *parts.vocabularies)}
    if not weights:
        check_files(folder)
        return None
    found = {name: weights_of(folder / name, classes[name], variant) for name in parts.networks}
    check_files(folder)
    for name, (files, own) in found.items():
        prove(classes[name], folder / name, files, own)
    for tokenizer, encoder in parts.vocabularies.items():
        _check_vocabulary(classes[tokenizer], folder, tokenizer, encoder)
    return next((own for _, own in found.values() if own), None)


def network_files(folder: Path, parts: Parts, variant: str | None) -> dict[str, list[Path]]:
    """The weight files of each network in a folder that `check_folder` has proved; `variant` is what it returned."""
    index = read_json(folder / "model_index.json")
    return {
        name: weights_of(folder / name, _class(folder, index, name), variant)[0] for name in parts.here(index).networks
    }


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler of a pipeline's folder: betas, prediction type, spacing, offset."""
    return read_json(folder / SCHEDULER)


def _class(folder: Path, index: Mapping[str, Any], component: str) -> Any:
    """The class of a component that model_index.json names, of diffusers or transformers."""
    import diffusers
    import transformers

    library, name = index.get(component) or (None, None)
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(name), None)
    if found is None:
        raise ValueError(
            f"{folder / 'model_index.json'} names {library}.{name} as {component}: a class of diffusers or transformers is needed."
        )
    return found


def weights_of(folder: Path, network: Any, variant: str | None) -> tuple[list[Path], str | None]:
    """The weight files that `from_pretrained` reads, and their variant."""
    stem = "diffusion_pytorch_model" if network.__module__.startswith("diffusers.") else "model"
    for candidate in dict.fromkeys((variant, None, *(() if variant else ("fp16",)))):
        if files := weight_files(folder, stem, candidate):
            return files, candidate
    here = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".ckpt", ".pt"))
    raise ValueError(
        f"No weights in {folder}: {stem}.safetensors or {stem}.fp16.safetensors is needed there; found "
        f"{', '.join(here[:4]) or 'nothing'} (*.bin files are pickles and never read; pipe.save_pretrained writes safetensors)."
    )


def prove(network: Any, folder: Path, files: list[Path], variant: str | None) -> None:
    """Hold the names and shapes in a component's files against its architecture's; nothing is loaded."""
    what, shapes = f"{folder.name} ({network.__name__})", tensor_shapes(files)
    where = files[0] if len(files) == 1 else folder
    refuse_lora(shapes, where)
    config = read_json(folder / "config.json")
    if not network.__module__.startswith("diffusers."):
        check_transformers(network, folder, where, what, variant=variant, use_safetensors=True)
        return
    state: Any = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"), quiet():
        model = network.from_config(config)
    if len(files) == 1:  # old names of attention layers, which diffusers still reads from single files
        model._fix_state_dict_keys_on_load(state)
    found, wanted = ({name: tuple(value.shape) for name, value in of.items()} for of in (state, model.state_dict()))
    check_names(found, wanted, where, what)


def _check_vocabulary(cls: Any, folder: Path, tokenizer: str, encoder: str) -> None:
    """The vocabulary is there, and all of it has a row in the text encoder."""
    config, place = read_json(folder / encoder / "config.json"), folder / tokenizer
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    # Other pipelines than CLIP's say how long a text may be; their tokenizers' own limit is that of a chat.
    positions = config.get("max_position_embeddings") if cls.__name__.startswith("CLIP") else None
    check_rows(load_tokenizer(cls, place), place, rows, positions, encoder)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for loading: they would run into those of the run."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    shown = [library for library in (ours, theirs) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
