"""Serve a reward over HTTP: from a name to a running server.

Torch is imported only for rewards that take torch tensors, and neither diffusers nor transformers are: in an environment with
an old stack it is enough to install this package without its dependencies (examples/other_environment).
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Shaped

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.config.yaml_text import with_arguments
from diffusion_rtb.remote_reward.client import check_token
from diffusion_rtb.remote_reward.messages import Limits
from diffusion_rtb.scoring.metadata import call_reward, takes_metadata
from diffusion_rtb.scoring.prompts import check_component_prompts, check_reward_prompts

__all__ = ["Address", "Arrays", "Work", "component_of", "numpy_score", "reward_id", "serve", "torch_score"]

if TYPE_CHECKING:
    from diffusion_rtb.remote_reward.app import Score


LOG = logging.getLogger(__name__)

Arrays = Literal["torch", "numpy"]
"""What the reward's __call__ takes and returns."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8817
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: use 1 to 65535.")
        if self.token is not None:
            try:
                check_token(self.token)
            except ValueError as error:  # a client would refuse to send it
                raise ValueError(f"The server's token {error}") from None
        if self.token is None and not _loopback(self.host):
            raise ValueError(
                f"Listening on {self.host!r} without a token would let everybody in the network use this machine. Set one in the "
                "environment (DIFFUSION_RTB_TOKEN), for the server and for its clients, or listen on 127.0.0.1."
            )


@dataclass(frozen=True)
class Work:
    """How much is accepted at a time, and where it is computed."""

    arrays: Arrays = "torch"
    device: str | None = None
    """Of torch rewards; None: the GPU if there is one."""
    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 16

    def __post_init__(self) -> None:
        if self.arrays not in ("torch", "numpy"):
            raise ValueError(f"arrays is {self.arrays!r}: use 'torch' or 'numpy'.")
        if self.arrays == "numpy" and self.device is not None:
            raise ValueError(f"device is {self.device!r}: it is for torch rewards; a numpy reward chooses its own.")
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting is {self.max_waiting}: at least 1.")


def component_of(name: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """`{component: NAME, ...}` from a name and `key=value` arguments with values in YAML.

    Raises:
        ValueError: an argument has another form, or comes twice.
    """
    return with_arguments({"component": name}, arguments)


def reward_id(component: Mapping[str, Any]) -> str:
    """The reward's name and a fingerprint of its arguments: equal for servers that were started alike."""
    text = json.dumps(component, sort_keys=True, default=str)
    return f"{component['component']}-{sha256(text.encode()).hexdigest()[:12]}"


def serve(component: Mapping[str, Any], address: Address, work: Work | None = None) -> None:
    """Build the reward and answer requests until SIGINT or SIGTERM; requests under way are still answered.

    Raises:
        ValueError: see `describe`, `Address` and `Work`; the extra `server` is not installed.
        OSError, SystemExit: the port is taken.
    """
    work = work or Work()
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise ValueError(
                f"Serving a reward needs {module}, which is not installed: pip install 'diffusion-rtb[server]'."
            )
    described = describe(component, "reward")

    import uvicorn

    from diffusion_rtb.remote_reward.app import Served, create_app
    from diffusion_rtb.remote_reward.connections import Patience, guarded_protocol, holders_of

    name = str(component["component"])
    reward = described.build()
    score = _score(reward, name, work)
    metadata = takes_metadata(reward)
    served = Served(name, reward_id(component), work.limits, work.max_waiting, token=address.token, metadata=metadata)

    def check(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        check_component_prompts(component, prompts, metadata)
        check_reward_prompts(reward, prompts, metadata, name)

    if address.token is None:
        LOG.warning("No token: every process of this machine may use the reward.")
    uvicorn.run(
        create_app(score, served, check),
        host=address.host,
        port=address.port,
        # Longer than the pause between two iterations of most runs; clients also survive being cut off.
        timeout_keep_alive=120,
        limit_concurrency=work.max_waiting + 240 + Patience.strangers,
        # What is accepted at one time cannot be closed before it was all accepted: it must fit below the limit of open files.
        backlog=128,
        http=guarded_protocol(holders_of(address.token)),
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
    )


def torch_score(reward: Any, name: str, device: str | None = None) -> Score:
    """The usual kind of reward: torch tensors on a device."""
    import torch

    from diffusion_rtb.scoring.call import evaluate_reward

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def score(
        images: Float32[np.ndarray, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> Float[np.ndarray, " batch"]:
        tensor = torch.from_numpy(images).to(place)
        return evaluate_reward(reward, tensor, prompts, name, metadata=metadata).cpu().numpy()

    return score


def numpy_score(reward: Any) -> Score:
    """A reward on numpy arrays, for environments without torch or with an old one.

    It is called with a read-only float32 array (batch, 3, height, width) in [0, 1], a list of prompts and, if it has a parameter
    `metadata`, a list of mappings, and returns one float per image.
    """

    def score(
        images: Float32[np.ndarray, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> Shaped[np.ndarray, "..."]:
        images.flags.writeable = False
        return np.asarray(call_reward(reward, images, list(prompts), metadata))

    return score


def _score(reward: Any, name: str, work: Work) -> Score:
    return numpy_score(reward) if work.arrays == "numpy" else torch_score(reward, name, work.device)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
