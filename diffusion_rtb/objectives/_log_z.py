r"""log Z, the log normaliser of the posterior p(x)·exp(beta·r(x)) / Z: learned, learned per prompt, or VarGrad.

Every trajectory carries a one-sample estimate of it, its log weight

    log w = beta·r - (log_q - log_p)           E_q[w] = Z,   E_q[log w] = ELBO <= log Z

and the RTB residual is log Z - log w. At the posterior log w = log Z on *every* trajectory, whoever drew it; that is why
a mean of log w over any behaviour will do as a baseline:

    learned      one scalar for the run. Wrong when the prompts of a run have different Z
    per_prompt   one scalar per row of the prompt table
    vargrad      log Z = mean of log w over the trajectories of the same prompt in the batch; nothing is learned

(Other penalties than the square have another log Z that makes them least: `Penalty.log_z`.)

**VarGrad's mean is detached.** The variance of log w within a group, 1/2 mean (log w - mean log w)², has the same
gradient whether or not it is taken through the mean: the derivative with respect to log Z vanishes at the mean, which
is the log Z with the least squared residual. So it is for `forward_kl` and `jeffreys`
at theirs. Under Huber or a dead zone the two differ, and the detached mean keeps the meaning "RTB with a log Z that is
estimated instead of learned". Its baseline includes the trajectory itself, so it is
(n - 1)/n times the leave-one-out gradient for a group of n.

Sources: RTB and relative VarGrad, Venkatraman et al. 2024, https://arxiv.org/abs/2405.20971; VarGrad, Richter et al.
2020, https://arxiv.org/abs/2010.10436.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_rtb.objectives._checks import check_choice
from diffusion_rtb.objectives._groups import check_groups, same_prompt
from diffusion_rtb.objectives._penalty import Penalty

__all__ = ["LearnedLogZ", "VarGrad", "build_log_z"]

KINDS = ("learned", "per_prompt", "vargrad")


class VarGrad(nn.Module):
    """log Z = the one at which the penalty of the same prompt's trajectories is least, detached; owns no parameters.

    Of the squared penalty, the default, it is the mean of their log w.
    """

    def __init__(self, penalty: Penalty | None = None) -> None:
        super().__init__()
        self.penalty = penalty or Penalty()

    def prepare(self, prompts: int) -> None:
        """Nothing depends on the number of prompts."""

    def forward(
        self, log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], beta: float
    ) -> Float[Tensor, " batch"]:
        """log Z of each trajectory's group; nats.

        Raises:
            ValueError: a prompt has a single trajectory: its own mean would make its residual 0 whatever it is.
        """
        check_groups('log_z="vargrad"', prompt, ', or use log_z="per_prompt"')
        member, _ = same_prompt(prompt)
        return torch.where(member, self.penalty.log_z(log_w.detach(), member)[:, None], 0).sum(dim=0)


class LearnedLogZ(nn.Module):
    """log Z as a parameter: one value, or one per prompt, that stands for log Z or for V_soft(x_T) = log Z / beta.

    A value is set to the log Z with the least penalty, for squares the mean log w, of the first batch that shows its prompt,
    because a log Z that starts at 0 spends the first iterations of a run catching up with beta·E[r]. Which values were set
    is part of the state.

    Args:
        per_prompt: one value per row of the prompt table; `prepare` creates them.
        in_reward_units: keep V_soft(x_T), which hardly moves when beta is annealed. The parameter is V in units of the first
            beta's alpha, so that it is nats at that beta and learns as fast whatever the unit of the reward is.
        penalty: whose least sum the first value is; squared when None.
    """

    value: nn.Parameter
    initialised: Tensor
    unit: Tensor

    def __init__(
        self, per_prompt: bool = False, *, in_reward_units: bool = False, penalty: Penalty | None = None
    ) -> None:
        super().__init__()
        self.penalty = penalty or Penalty()
        self.per_prompt = per_prompt
        self.in_reward_units = in_reward_units
        self._create(0 if per_prompt else 1)

    def _create(self, rows: int) -> None:
        self.value = nn.Parameter(torch.zeros(rows))
        self.register_buffer("initialised", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("unit", torch.ones(()))

    def prepare(self, prompts: int) -> None:
        """Create one value per prompt; one value in all unless `per_prompt`. ValueError without prompts."""
        if prompts < 1:
            raise ValueError(f"log Z needs at least one prompt, got {prompts}.")
        self._create(prompts if self.per_prompt else 1)

    def forward(
        self, log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], beta: float
    ) -> Float[Tensor, " batch"]:
        """log Z of each trajectory; nats. ValueError: a prompt is not a row of the table."""
        row = self._rows(prompt)
        self._initialise(log_w.detach(), row, beta)
        return self.value[row] * self._nats(beta)

    def _nats(self, beta: float) -> Float[Tensor, ""] | float:
        return self.unit * beta if self.in_reward_units else 1.0

    def _rows(self, prompt: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        if not self.per_prompt:
            return torch.zeros_like(prompt)
        rows = len(self.value)
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"Prompt row {high if high >= rows else low} has no log Z: the table has {rows} rows. "
                "Call prepare(prompts=...) with the number of prompts of the run before the first batch."
            )
        return prompt

    @torch.no_grad()
    def _initialise(self, log_w: Float[Tensor, " batch"], row: Int[Tensor, " batch"], beta: float) -> None:
        new = ~self.initialised[row]
        if not bool(new.any()):
            return
        if not bool(self.initialised.any()):
            self.unit.fill_(1 / beta)
        member, rows = same_prompt(row[new])
        self.value[rows] = (self.penalty.log_z(log_w[new], member) / self._nats(beta)).to(self.value.dtype)
        self.initialised[rows] = True


def build_log_z(kind: str, penalty: Penalty, *, in_reward_units: bool = False) -> VarGrad | LearnedLogZ:
    """The log Z named `kind` under a penalty; ValueError where there is none."""
    if check_choice("log_z", kind, KINDS) == "vargrad":
        return VarGrad(penalty)
    return LearnedLogZ(kind == "per_prompt", in_reward_units=in_reward_units, penalty=penalty)
