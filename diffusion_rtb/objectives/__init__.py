"""Objectives: losses on the log-densities of trajectories.

An objective sees `Terms` (small tensors, no networks, no pipelines) and answers a `Loss`. Each lives in one file and is
named in a config by its file, so that a new one needs no edit elsewhere; README.md lists them and shows how to add one.
"""
