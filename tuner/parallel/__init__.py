"""Many ranks: the mesh of process groups, and sequences that are cut over ranks."""
