"""Training data: datasets in memory and streams from disk, checked once and handed out in batches."""
