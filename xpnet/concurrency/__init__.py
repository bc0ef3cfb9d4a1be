"""Threads and signals: one thread at a time uses a model, and Ctrl-C leaves it whole."""
