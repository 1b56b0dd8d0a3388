"""Pipeline families, one file each: load a prior, make it stochastic, attach the posterior, sample, export."""
