"""Several processes of one run: started, watched and ended together."""
