"""The runner: strategy, loop, hooks, checkpoints."""
