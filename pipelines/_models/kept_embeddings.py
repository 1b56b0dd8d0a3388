"""Embeddings of prompts on the disk, by content: the same text encoders, tokenizers, prompt and arguments are one file.

A file appears whole or not at all, and two processes that write the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_rtb.files.whole import whole

__all__ = ["KeptEmbeddings"]

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""Tensors, or lists of tensors, by name."""


class KeptEmbeddings:
    """A folder of embeddings.

    Args:
        folder: Made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._encoders = ""

    def found(self, pipe: Any, asked: Mapping[str, Any], device: Any, encode: Callable[[], Row]) -> Row:
        """The kept answer to `asked`, on the device, or that of `encode`, which is kept.

        Args:
            pipe: Whose text encoders and tokenizers would answer.
            asked: Everything else that decides the answer; JSON values.
            device: Where the answer goes; its kind is part of the key, as kinds of devices round differently.
            encode: What has to be done where nothing is kept.

        Raises:
            DiskError: the answer cannot be written.
        """
        self._encoders = self._encoders or digest_of(pipe)
        text = json.dumps(
            {"encoders": self._encoders, "device": device.type} | dict(asked), sort_keys=True, default=str
        )
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
        row = _read(path)
        if row is None:
            row = encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, row)
        return {name: _each(value, lambda tensor: tensor.to(device)) for name, value in row.items()}


def digest_of(pipe: Any) -> str:
    """What tells the text encoders and tokenizers of a pipeline from others: every weight, config and vocabulary."""
    found = hashlib.sha256(type(pipe).__name__.encode())
    for name, component in sorted(pipe.components.items()):
        if name.startswith("text_encoder") and isinstance(component, nn.Module):
            settings: Any = component.config
            config = {key: value for key, value in settings.to_dict().items() if not key.startswith("_")}
            found.update(
                f"{name} {type(component).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode()
            )
            for key, value in sorted(component.state_dict().items()):
                found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif name.startswith(("tokenizer", "processor")) and hasattr(component, "save_pretrained"):
            with TemporaryDirectory() as folder:
                component.save_pretrained(folder)
                for file in sorted(Path(folder).rglob("*")):
                    if file.is_file():
                        found.update(f"{name} {file.relative_to(folder)}".encode() + file.read_bytes())
    return found.hexdigest()


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return [change(item) for item in value] if isinstance(value, list) else change(value)


def _write(path: Path, row: Row) -> None:
    """A list of tensors is NAME/0, NAME/1, …"""
    tensors: dict[str, Tensor] = {}
    for name, value in row.items():
        tensors |= {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
    with whole(path) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)


def _read(path: Path) -> Row | None:
    """What was written; None where nothing is, or nothing that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s cannot be read (%s) and is written anew.", path, error)
        return None
    row: Row = {}
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[0].partition("/")[0], int(item[0].partition("/")[2] or 0))
    ):
        base, listed, _ = name.partition("/")
        row[base] = [*row.get(base, []), tensor] if listed else tensor
    return row
