"""What every script shares: command line, checkpoints, training helpers, run folders, processes."""
