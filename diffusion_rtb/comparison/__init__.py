"""Objectives and behaviours side by side, against a truth that is known: `diffusion-rtb compare`."""
