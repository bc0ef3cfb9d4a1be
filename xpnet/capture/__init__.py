"""Captured steps: a training step recorded as a list of calls on fixed arrays, simplified, and replayed."""
