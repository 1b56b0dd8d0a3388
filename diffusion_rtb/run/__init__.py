"""A run on disk: its folder, checkpoints, metrics, the posterior in it and its export. Opening one needs no trainer."""
