"""Programs that measure. Never timed tests: a time on a shared machine means nothing alone."""
