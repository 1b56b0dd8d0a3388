"""Is a reward fit for training? Checks, what they are run on, and their report."""
