"""PPO on environments: environments -> Rollout -> update."""
