"""What the priors with known posteriors share."""
