"""How a batch becomes an update of the posterior: along trajectories, or at single states."""
