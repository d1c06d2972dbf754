"""From rows on disk to packed batches."""
