"""Objectives and behaviours side by side, against a truth that is known: `diffusion-rtb compare`.

* `exact`       what a pipeline whose posterior is known tells about it: the only thing the comparison asks of a pipeline
* `variants`    named objectives and behaviours, and the runs that they make of one config
* `trainer`     the ordinary trainer with a clock, and a look at the posterior now and then
* `measure`     all numbers of one sampler; `mode_weights` and `wasserstein` are those that need the truth
* `cells`       one run of the grid: trained, measured, and never twice
* `grid`        all of them, in one folder that can be interrupted
* `table`, `figure`   what comes out
"""
