"""What training will see, shown before anything is trained: samples token by token, packs, histograms."""
