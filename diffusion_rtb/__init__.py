"""Fine-tune diffusion models towards the posterior p(x)·exp(beta·r(x)) / Z by relative trajectory balance."""

__version__ = "0.1.0"
