"""Objectives and behaviours side by side, against the truth: `diffusion-rtb compare`."""
