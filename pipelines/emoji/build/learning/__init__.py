"""How the bundled models learn: a schedule by the clock, averages, checkpoints, and the optimiser."""
