"""Spaces to measure distances in that are no rewards, one file each; a config names them in `eval.embedder`."""
