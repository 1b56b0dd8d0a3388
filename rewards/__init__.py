"""Rewards, one file each: float images in [0, 1] of shape (batch, 3, H, W) and their prompts in, (batch,) finite floats out.

A reward is any callable with that signature. It leaves its inputs unchanged, returns values on the images' device, one per
image and independent of the other images in the batch; higher is better. beta (nats per unit of reward) belongs to the run.
"""
