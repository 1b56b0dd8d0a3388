"""Behaviours: the chains that produce the trajectories an objective is evaluated on, one file each.

A behaviour is orthogonal to the objective. A config lists them as `behaviours: [{component: NAME, ...}]`; each is a `Source` of
trajectories that draws its `share` of each prompt's group, and what the others leave is the posterior's own.

    file             trajectories                                                  density they were drawn with
    on_policy        the posterior's own, with extra noise that decays              known
    prior_buffer     the prior's, as they are or re-sampled by exp(beta·r)          known, unless re-sampled or noised
    replay           the posterior's of earlier iterations                          known, unless by priority
    back_and_forth   good samples noised back and denoised again                    unknown
    steered          the prior's, re-sampled by their values on the way             unknown

A new one is a file here, or `module:Class`: its settings are the annotated arguments of its constructor, and what it says of itself
decides what is refused beside it (`training/compatibility.py`).
"""

from diffusion_rtb.behaviours._source import Kept, Share, Source

__all__ = ["Kept", "Share", "Source"]
