"""Local weight files: refused when missing, truncated or of another architecture; never unpickled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_weights", "load_weights"]


def check_weights(path: Path | str) -> Path:
    """Look at a weights file without loading it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is truncated, or of a kind that is not read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No weights file at {path}; give the path of a .safetensors or .pth file on this machine."
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's length
                return path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again.") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; weights are read from .safetensors, .pth, .pt or .bin files."
        )
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):  # a zip's directory is at its end
            raise ValueError(f"{path} is truncated ({path.stat().st_size} bytes); fetch it again.")
    return path


def load_weights(module: nn.Module, path: Path | str, what: str) -> None:
    """Fill `module`, which errors call `what`, with a state dict: a safetensors file, or one that torch saved.

    Raises:
        FileNotFoundError, ValueError: see `check_weights`; or the weights belong to another architecture.
    """
    state = _state_dict(check_weights(path))
    own = module.state_dict()
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    lacking, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if wrong or lacking or surplus:
        found = {"of another shape": sorted(wrong), "missing": lacking, "unknown": surplus}
        parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in found.items() if names]
        raise ValueError(f"{path} does not hold the weights of {what}: {'; '.join(parts)}.")
    module.load_state_dict(state)


def _state_dict(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({error}); save the state dict alone."
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not (isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values())):
        raise ValueError(f"{path} holds a {type(found).__name__} that is not a state dict; save model.state_dict().")
    return {name.removeprefix("module."): value for name, value in found.items()}
