"""The package under train.py, rollout.py, reward.py and loss.py. Each file has one subject; its first line names it."""
