"""Trees of source code as documents: which files, in which order, between which fences."""
