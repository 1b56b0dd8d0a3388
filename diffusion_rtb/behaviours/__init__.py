"""Behaviours: the chains that produce the trajectories an objective is evaluated on, one file each.

A behaviour is orthogonal to the objective. Each is a `Source` of trajectories (`source.py`); a batch is put together from
several, and the trainer fills in the log-densities a source does not know. Adding one is one new file here.
"""
