"""The training loop: what a trainer is made of, an iteration, its gradient, its numbers and its state."""
