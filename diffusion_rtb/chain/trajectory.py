"""What a recorder records: the states of a batch of denoising chains and the log-density of every transition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.files.whole import whole

__all__ = ["Trajectory"]

T = TypeVar("T", bound="Trajectory")
FORMAT = "diffusion_rtb.trajectory/1"


@dataclass(frozen=True, eq=False)
class Trajectory(Rows):
    r"""A batch of trajectories x_T, …, x_0 and log N(x_s; mean, std²·I) of each transition x_t -> x_s.

    A step whose `std` is 0 is a deterministic map for prior and posterior alike: it carries no log-density, its
    `log_prob` is 0, and `stochastic` is False there. A final step may be of that kind, steps that the scheduler leaves to the
    ODE (`FlowMatchSDEScheduler` with a `window`), and all steps of a chain of which only x_0 is wanted.
    """

    shared: ClassVar[frozenset[str]] = frozenset({"timesteps", "std"})

    x: Float[Tensor, "batch steps_and_one *dims"]
    """States: x[:, 0] is the initial noise x_T, x[:, i+1] what step i returned, x[:, -1] the clean x_0."""
    timesteps: Float[Tensor, " steps"]
    """The scheduler's timestep at each step, decreasing."""
    std: Float[Tensor, " steps"]
    """Standard deviation of each transition; 0 marks a deterministic step."""
    log_prob: Float[Tensor, "batch steps"]
    """Log-density of each transition under the network that was recorded: summed over dims, nats, fp32."""
    log_behaviour: Float[Tensor, "batch steps"] | None = None
    """Log-density under the chain that drew the step, where exploration noise made it differ from `log_prob`; nats."""
    output_norm: Float[Tensor, "batch steps"] | None = None
    """|e| of what the recorded network answered at each step (`normal.output_norm`); 0 where the step has no density."""

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def steps(self) -> int:
        return self.x.shape[1] - 1

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])

    @property
    def x_0(self) -> Float[Tensor, "batch *dims"]:
        """The clean end of each chain."""
        return self.x[:, -1]

    @property
    def stochastic(self) -> Bool[Tensor, " steps"]:
        """True where the transition has a density."""
        return self.std > 0

    @property
    def has_density(self) -> bool:
        """Whether any transition has one: a chain without noise is a map of x_T, and its `log_prob` says nothing."""
        return bool(self.stochastic.any())

    @property
    def drawn_with(self) -> Float[Tensor, "batch steps"]:
        """Log-density of each transition under the chain that drew it: the recorded network's, unless there was exploration."""
        return self.log_prob if self.log_behaviour is None else self.log_behaviour

    @classmethod
    def cat(cls: type[T], parts: Sequence[T]) -> T:
        """Join batches that were drawn on the same schedule.

        Raises:
            ValueError: there are no parts, or their timesteps or standard deviations differ.
        """
        if not parts:
            raise ValueError("Trajectory.cat needs at least one trajectory, got none.")
        first = parts[0]
        for part in parts[1:]:
            if not (torch.equal(part.timesteps, first.timesteps) and torch.equal(part.std, first.std)):
                raise ValueError(
                    f"Trajectories of different schedules cannot be joined: timesteps {first.timesteps.tolist()} and "
                    f"{part.timesteps.tolist()}. Record them with the same scheduler, steps and eta."
                )
        if any(part.log_behaviour is not None for part in parts):
            parts = [replace(part, log_behaviour=part.drawn_with) for part in parts]
        return super().cat(parts)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name, contiguous."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.contiguous() for k, v in found.items() if v is not None}

    def save(self, path: Path | str) -> None:
        """Write the trajectory as one safetensors file."""
        with whole(Path(path)) as unfinished:
            save_file(self.tensors(), unfinished, metadata={"format": FORMAT})

    @staticmethod
    def load(path: Path | str, device: torch.device | str = "cpu") -> Trajectory:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is truncated, or not a trajectory.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No trajectory file at {path}.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                found = (file.metadata() or {}).get("format")
                if found != FORMAT:
                    raise ValueError(
                        f"{path} holds format {found!r}, not {FORMAT!r}: it was not written by Trajectory.save."
                    )
                return Trajectory(**{name: file.get_tensor(name) for name in file.keys()})
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); record the trajectory again."
            ) from error
