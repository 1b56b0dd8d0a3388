"""Looking now and then at whether the reward is being hacked, and keeping the best checkpoint."""
