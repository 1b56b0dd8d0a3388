"""Several runs of one config as one frontier: a key is swept, each point is an ordinary run."""
