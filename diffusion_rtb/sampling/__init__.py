"""Prompts and seeds in, trajectories with rewards or pictures out."""
