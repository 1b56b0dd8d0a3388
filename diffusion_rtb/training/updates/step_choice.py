r"""Which steps of an update on states get a gradient, and the factor of each with which the sum over all steps is met on average.

    sum over chosen t of g_t / pi_t,     pi_t: probability that t is among the chosen ones        E = sum over all t of g_t

`stratified`: pi_t = count / steps, each step equally often over the micro-batches, give or take one. `importance`: pi_t follows the
size of the gradient, as far as it is known, mixed with a floor, which bounds the factor by 1/FLOOR of that of `stratified`:

    s_t² = running mean of |d loss_t / d parameters|², over micro-batches and iterations
    p_t = (1 - FLOOR)·s_t / sum of s + FLOOR / steps,      pi_t = min(1, c·p_t) with sum of pi = count

drawn systematically, so that no step comes twice and the micro-batches share the line evenly. s_t is only known of iterations
before, so that it depends on nothing that is drawn now, and any s_t leaves the estimate unbiased. Until each step was seen all are
drawn alike. The size at the network's answer, which would cost nothing, or of the loss, leaves out how much of it reaches the
parameters: on `gmm25` the first made the gradient noisier than drawing all alike.

Sources: timesteps by the loss, Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672; unequal probabilities, Horvitz and
Thompson 1952, https://doi.org/10.1080/01621459.1952.10483446
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.training.schedules import dealt

__all__ = ["Chosen", "StepChoice", "included", "stratified"]

Chosen = Mapping[int, float]
"""Step -> its 1/pi_t, in units of steps/count: 1 where all have the same chance."""

FLOOR = 0.1
"""Share of p that all steps have alike."""
KEPT = 0.9
"""Of the running mean, per iteration."""


def stratified(dense: Sequence[int], count: int | None, micro_batches: int, seed: int) -> list[Chosen]:
    """For each micro-batch, all steps alike; None: all of them."""
    return [dict.fromkeys(steps, 1.0) for steps in dealt(dense, count, micro_batches, seed)]


class StepChoice:
    """`importance`, with what it remembers; see the module."""

    def __init__(self) -> None:
        self.squares: Float[Tensor, " steps"] | None = None
        """s_t² of the steps with a density, float64; NaN where it was not seen yet."""
        self._seen: dict[int, list[Tensor]] = {}
        self._squares: list[Tensor] = []
        self._dense: list[int] = []

    def chosen(self, dense: Sequence[int], count: int | None, micro_batches: int, seed: int) -> list[Chosen]:
        """For each micro-batch `count` steps, whatever was drawn for the others."""
        self._dense = list(dense)
        if self.squares is None or bool(self.squares.isnan().any()) or count is None or count >= len(dense):
            return stratified(dense, count, micro_batches, seed)
        size = self.squares.sqrt()
        alike = torch.full_like(size, 1 / len(size))
        share = (1 - FLOOR) * size / size.sum() + FLOOR * alike if float(size.sum()) > 0 else alike
        pi = included(share, count)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dense), generator=generator)
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        ends = pi[order].cumsum(0)
        found: list[Chosen] = []
        for m in range(micro_batches):
            marks = (offset + m / micro_batches) % 1 + torch.arange(count, dtype=torch.float64)
            places = torch.searchsorted(ends, marks, right=True).clamp(max=len(dense) - 1)
            mine = sorted(order[places].tolist())
            found.append({dense[i]: count / (len(dense) * float(pi[i])) for i in mine})
        return found

    @contextmanager
    def watching(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Inside the block `note` knows the gradient of what was backward last."""

        def keep(gradient: Tensor) -> None:
            self._squares.append(gradient.detach().double().square().sum())

        handles = [parameter.register_hook(keep) for parameter in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, step: int, scale: float) -> None:
        """A step's gradient was taken, `scale` times that of the mean over its samples."""
        square = torch.stack(self._squares).sum().cpu() / scale**2
        self._squares = []
        self._seen.setdefault(step, []).append(square)

    def settle(self, mean: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """The iteration has succeeded: take in what was noted. `mean` is over the processes, which choose alike."""
        places = {step: i for i, step in enumerate(self._dense)}
        total, seen = torch.zeros(2, len(places), dtype=torch.float64)
        for step, squares in self._seen.items():
            total[places[step]], seen[places[step]] = torch.stack(squares).sum(), float(len(squares))
        self._seen = {}
        total, seen = mean([total, seen])
        new = torch.where(seen > 0, total / seen, torch.nan)
        held = torch.full_like(new, torch.nan) if self.squares is None else self.squares
        moved = torch.where(held.isnan(), new, KEPT * held + (1 - KEPT) * new)
        self.squares = torch.where(new.isnan(), held, moved)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; what was noted of an iteration that failed is dropped."""
        return {} if self.squares is None else {"squares": self.squares}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.squares, self._seen, self._squares = tensors.get("squares"), {}, []


def included(share: Float[Tensor, " steps"], count: int) -> Float[Tensor, " steps"]:
    """min(1, c·share) with the c that makes them sum to `count`; float64."""
    pi, full = share.double(), torch.zeros(len(share), dtype=torch.bool)
    while True:
        left = count - int(full.sum())
        pi = torch.where(full, 1.0, share.double() * (left / float(share[~full].sum())))
        over = (pi > 1) & ~full
        if not bool(over.any()):
            return pi
        full = full | over
