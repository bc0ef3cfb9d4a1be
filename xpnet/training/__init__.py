"""Training: what fit does, from its arguments to the captured step."""
