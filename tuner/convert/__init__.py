"""From a checkpoint to a directory others can load."""
