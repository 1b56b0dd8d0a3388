"""Steering at inference: draw towards p(x)·exp(beta·r(x)) / Z without training, one file for each way.

Each is a class of settings, whose `around` is a `with` block around the scheduler of a stock pipeline, like the recorder.

    file       what it does                                                             what its samples are
    best_of    the best of n independent samples                                        no posterior
    smc        chains re-sampled by their values on the way                             the posterior, with an error of 1/particles
    svdd       one of several proposals at every step, by its value                     the posterior if the value is exact
    rlg        prior and posterior of a trained run, mixed with any weight              other strengths, approximately
    value_guidance  steps moved up the gradient of a learned value                      towards the posterior; exactly, by weights

A new one is a file here, or `module:Class`, with the members of `Method`.
"""

from diffusion_rtb.steering._aim import Aim, State
from diffusion_rtb.steering._drawn import Steered, rewards_of, steered
from diffusion_rtb.steering._images import steered_images
from diffusion_rtb.steering._method import Method
from diffusion_rtb.steering._particles import Particles

__all__ = ["Aim", "Method", "Particles", "State", "Steered", "rewards_of", "steered", "steered_images"]
