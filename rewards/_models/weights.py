"""Weight files, local or from the hub: refused when missing, truncated or of another architecture; never unpickled."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_rtb.files.completeness import check_finite, looks_like, refuse_lora
from rewards._models.torchscript import is_torchscript, read_torchscript

__all__ = ["HUB", "check_weights", "fetch", "fill", "read_weights"]

HUB = "hf-hub:"
"""`hf-hub:OWNER/NAME/FILE` is a file of a hub repository."""


def check_weights(path: Path | str) -> Path:
    """Look at a weights file without loading it; of a file on the hub, at its name.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is truncated, or of a kind that is not read.
    """
    if str(path).startswith(HUB):
        _hub_file(str(path))
        return Path(path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No weights file at {path}; give the path of a .safetensors or .pth file on this machine."
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:  # compares the header with the file's length
                refuse_lora(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again.") from error
        return path
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; weights are read from .safetensors, .pth, .pt or .bin files."
        )
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):  # a zip's directory is at its end
            raise ValueError(f"{path} is truncated ({path.stat().st_size} bytes); fetch it again.")
    return path


def fetch(source: Path | str) -> Path:
    """The path of a weights file, downloaded to the hub's cache if it is `hf-hub:OWNER/NAME/FILE` and not there yet.

    Raises:
        FileNotFoundError, ValueError: see `check_weights`; or the hub does not give the file.
    """
    if not str(source).startswith(HUB):
        return check_weights(source)
    from huggingface_hub import hf_hub_download

    repository, name = _hub_file(str(source))
    try:
        return check_weights(hf_hub_download(repository, name))
    except (
        OSError
    ) as error:  # every failure of the hub's client: no network, no such repository, no such file, no access
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{source} cannot be fetched: {reason} Where there is no network, download the file elsewhere and give its path."
        ) from error


def _hub_file(source: str) -> tuple[str, str]:
    """Repository and file of `hf-hub:OWNER/NAME/FILE`."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+)", source.removeprefix(HUB))
    if found is None:
        raise ValueError(f"{source!r} names no file on the hub: write {HUB}OWNER/NAME/FILE.")
    return found[1], found[2]


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: Path | str,
    what: str,
    unused: Collection[str] = (),
    *,
    others: Literal["refused", "told"] = "refused",
) -> None:
    """Fill `module`, which errors call `what`, with the tensors that were read from `path`, converted to its precision.

    Args:
        module: The network.
        state: Its tensors by name.
        path: Where they were read.
        what: What errors call the network.
        unused: Names that the published file has and the network has no need of.
        others: What is done about further names: they are "refused" where the published code refuses them, else "told".

    Raises:
        ValueError: the weights belong to another architecture.
    """
    refuse_lora(state, path)
    own = module.state_dict()
    state = {name: value for name, value in state.items() if name in own or name not in unused}
    if others == "told" and (extra := [name for name in state if name not in own]):
        warnings.warn(
            f"{path} has {len(extra)} tensors that {what} does not use, as in the published code: {_listed(extra)}.",
            stacklevel=2,
        )
        state = {name: value for name, value in state.items() if name in own}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    lacking, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if wrong or lacking or surplus:
        found = {"of another shape": sorted(wrong), "missing": lacking, "unknown": surplus}
        parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in found.items() if names]
        hint = looks_like(lacking, surplus)
        raise ValueError(f"{path} does not hold the weights of {what}: {'; '.join(parts)}. {hint}")
    check_finite(state, path)
    module.load_state_dict(state)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without `module.`, `_orig_mod.` or a `state_dict` around them.

    Of a TorchScript archive, as OpenAI publishes CLIP, only the tensors are read; the code in it is not run.

    Raises:
        FileNotFoundError, ValueError: see `check_weights`; or the file is damaged, or holds more than tensors.
    """
    path = check_weights(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _bare(load_file(path))
    if is_torchscript(path):
        return read_torchscript(path)
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
    return _bare(found)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel and torch.compile put in front of all of them."""
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
