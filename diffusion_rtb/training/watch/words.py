"""An alarm in words: what rose, what fell, since when, and what to do."""

from __future__ import annotations

from pathlib import Path

from diffusion_rtb.run.best import Best
from diffusion_rtb.training.watch.change import Change, Verdict

__all__ = ["warning"]


def warning(iteration: int, since: int, found: Verdict, picture: Path, best: Best | None) -> str:
    """The text of an alarm.

    Args:
        iteration: Of the look.
        since: Of the first look that raised it, without one between that did not.
        found: What has changed.
        picture: Where prior and posterior are side by side.
        best: The best checkpoint, if there is one.
    """
    began = "now" if since == iteration else f"since iteration {since}"
    rise = found.rise
    kept = (
        f"the best checkpoint without an alarm is that of iteration {best.iteration} (--checkpoint best)"
        if best is not None
        else "no look so far was without an alarm"
    )
    wrong = " and ".join(_said(change) for change in found.wrong)
    return (
        f"The reward looks hacked at iteration {iteration}, {began}: it rose by {rise.size:.1f} prior standard deviations "
        f"({_numbers(rise)}) at the same prompts and seeds, while {wrong}. See {picture}: prior and posterior at the same noise. "
        "What helps: a smaller beta or beta.kl_budget, a smaller train.lr, an objective with a KL, a reward "
        f"with a ceiling (clamp) or several (ensemble). Meanwhile {kept}. If this is what the reward asks for, widen watch.bands."
    )


def _said(change: Change) -> str:
    match change.kind:
        case "judge":
            return f"the judge {change.name} fell by {change.size:.1f} of its own ({_numbers(change)})"
        case "diversity":
            return f"the diversity fell by {change.size:.0%} (mean pairwise distance {_numbers(change)})"
        case _:
            return f"the network's answers grew {change.size:.0%} louder than the prior's (|e_q| / |e_p| {_numbers(change)})"


def _numbers(change: Change) -> str:
    return f"{change.before:.3g} -> {change.now:.3g}"
