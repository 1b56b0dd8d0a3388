"""Is a model on disk whole? What its files lack is an error with the remedy, before anything is loaded or trained.

Libraries fill what a file lacks with random numbers, or leave it empty, and go on: the network then draws noise, another one at
every start. So the names and shapes in the files are held against those of the architecture, and nothing may be missing.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LORA",
    "check_finite",
    "check_names",
    "check_transformers",
    "looks_like",
    "read_json",
    "refuse_lora",
    "tensor_shapes",
    "weight_files",
]

Shape = tuple[int, ...]

HARMLESS = re.compile(r"(^|\.)position_ids$|(^|\.)num_batches_tracked$")
"""Surplus tensors that say nothing: 0, 1, 2, … of old files of transformers, and a counter."""

LORA = re.compile(
    r"\.base_layer\.|\.lora_[AB]\.|lora_(down|up)\b|_lora\.(down|up)\.|lora_linear_layer|lora_magnitude_vector"
)
FUSED = re.compile(r"\.(to_qkv|to_kv)\.")
QUANTIZED = re.compile(
    r"\.(SCB|weight_format|qweight|qzeros|absmax|quant_map|weight_scale|scale_weight)\b|\.(absmax|quant_state)"
)

WRAPPERS = {
    "module": "DistributedDataParallel", "_orig_mod": "torch.compile", "_fsdp_wrapped_module": "FSDP",
    "base_model.model": "peft", "model.diffusion_model": "single-file checkpoints",
}  # fmt: skip
"""What puts a prefix in front of every name -> whose it is."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, or it is damaged; the message names it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no {file}: the folder is incomplete; copy or download it again.") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged, it is not JSON ({error}): copy or download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not a JSON object: copy or download it again.")
    return found


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files that a library reads for a network: one, or the shards that an index names; [] if there are none.

    Args:
        folder: Of the network.
        stem: "model" for transformers, "diffusion_pytorch_model" for diffusers.
        variant: Such as "fp16": part of the files' names.

    Raises:
        ValueError: a shard is missing.
    """
    middle = f".{variant}" if variant else ""
    indices = (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json")
    index = next((folder / name for name in indices if (folder / name).is_file()), None)
    single = folder / f"{stem}{middle}.safetensors"
    if index is None or (stem == "model" and single.is_file()):  # diffusers prefers an index, transformers one file
        return [single] if single.is_file() else []
    shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    lost = [shard.name for shard in shards if not shard.is_file()]
    if lost or not shards:
        raise ValueError(
            f"{index} names {len(shards)} files, and {len(lost)} are not there ({', '.join(lost[:3])}): copy or download them."
        )
    return shards


def tensor_shapes(files: Sequence[Path]) -> dict[str, Shape]:
    """Names and shapes of the tensors in safetensors files, from their headers; nothing is loaded.

    Raises:
        ValueError: a file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Shape] = {}
    for file in files:
        try:
            # It compares the header with the file's length. For torch it would reserve memory of the file's size.
            with safe_open(file, framework="np") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): copy or download it again.") from error
    return found


def check_names(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: Path | str, what: str) -> None:
    """Hold the tensors in a network's files against those that the network needs; surplus ones are warned of.

    Raises:
        ValueError: one is missing or of another shape, or there is a LoRA beside them; the message says what it looks like.
    """
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [name for name in sorted(wanted.keys() & found.keys()) if found[name] != wanted[name]]
    _judge(missing, surplus, [f"{name} {found[name]} instead of {wanted[name]}" for name in wrong], where, what)


def _judge(missing: list[str], surplus: list[str], wrong: list[str], where: Path | str, what: str) -> None:
    surplus = [name for name in surplus if not HARMLESS.search(name)]
    if missing or wrong or any(LORA.search(name) for name in surplus):
        kinds = {"missing": missing, "of another shape": wrong, "unknown": surplus}
        parts = [f"{len(names)} {kind} (first: {', '.join(names[:2])})" for kind, names in kinds.items() if names]
        raise ValueError(
            f"{where} does not hold the weights of {what}: {'; '.join(parts)}. {looks_like(missing, surplus)}"
        )
    if surplus:
        warnings.warn(
            f"{where} holds {len(surplus)} tensors that {what} has no place for (first: {', '.join(surplus[:3])}); they are not "
            "used. If they matter, config.json is that of another model.",
            stacklevel=4,
        )


def looks_like(missing: Sequence[str], surplus: Sequence[str]) -> str:
    """A sentence on how a file comes to lack `missing` and to hold `surplus`, with the remedy."""
    if any(LORA.search(name) for name in surplus):
        return (
            "It was saved with a LoRA inside: load it as it was, call fuse_lora() and unload_lora_weights() on the pipeline "
            "(merge_and_unload() on a model of peft), and save it again."
        )
    if prefix := _prefix(missing, surplus):
        remedy = (
            "call merge_and_unload() and save it again"
            if "base_model" in prefix
            else "save the bare model, or strip that prefix"
        )
        return f"All names begin with {prefix + '.'!r}{_wrapper(prefix)}: {remedy}."
    if prefix := _prefix(surplus, missing):
        return f"The names lack {prefix + '.'!r} in front: it is a part of such a model, saved alone; save the whole model."
    if any("_orig_mod." in name for name in surplus):
        return "Parts were compiled when it was saved: strip every '_orig_mod.' from the names, or save the model uncompiled."
    if any(FUSED.search(name) for name in surplus):
        return "It was saved with fused projections: call unfuse_qkv_projections() and save it again."
    if any(QUANTIZED.search(name) for name in surplus):
        return "It looks quantized: give the model in float32, float16 or bfloat16."
    if missing and surplus:
        return "The names are those of another model or version: config.json and the weights must be saved together."
    if missing:
        return "The file was cut or saved in part: copy, download or save the model again."
    return "config.json and the weights are not of one model: copy or save both together."


def _prefix(missing: Sequence[str], surplus: Sequence[str]) -> str | None:
    """What stands before all of `missing` in `surplus`."""
    lacking = set(missing)
    for name in surplus[:50]:
        for dot in (found.start() for found in re.finditer(r"\.", name)):
            if name[dot + 1 :] in lacking:
                prefix = name[:dot]
                return prefix if lacking <= {other.removeprefix(f"{prefix}.") for other in surplus} else None
    return None


def _wrapper(prefix: str) -> str:
    names = [library for part, library in WRAPPERS.items() if part in prefix]
    return f", which {' and '.join(names)} put there" if names else ""


def refuse_lora(names: Collection[str], where: Path | str) -> None:
    """Refuse weights with a LoRA among them; ValueError."""
    if inside := sorted(name for name in names if LORA.search(name)):
        raise ValueError(
            f"{where} holds {len(inside)} tensors of a LoRA (first: {inside[0]}). {looks_like((), inside)}"
        )


def check_transformers(model_class: Any, name: str | Path, where: str | Path, what: str, **options: Any) -> Any:
    """Let transformers match names, with its own renamings, on a network without memory; what it would fill is an error.

    Args:
        model_class: With `from_pretrained`.
        name: A folder, or a hub id whose files are here already or are fetched.
        where: Its file or folder, for messages.
        what: The network, for messages.
        options: Of `from_pretrained`.

    Returns:
        The network on the meta device, for its sizes.

    Raises:
        ValueError: it cannot be read; a weight is missing or of another shape.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # a table of what it fills is what this replaces
    logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            name, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"The weights of {str(where)!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    wrong = [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in sorted(report["mismatched_keys"])]
    _judge(sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), wrong, where, what)
    return model


def check_finite(network: nn.Module | Mapping[str, Tensor], where: Path | str) -> None:
    """Refuse weights that are not finite numbers, in the precision that they were loaded in; ValueError."""
    tensors = network.state_dict() if isinstance(network, nn.Module) else network
    for name, value in tensors.items():
        # The sum is not finite if one entry is not; a sum that overflows is looked at again.
        if value.is_floating_point() and not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            remedy = " Load it in float32 or bfloat16, whose range is larger." if value.dtype == torch.float16 else ""
            raise ValueError(
                f"{where}: {count} of {value.numel()} values of {name} are NaN or infinite in {value.dtype}: the file is damaged, "
                f"or comes from a training that diverged.{remedy}"
            )
