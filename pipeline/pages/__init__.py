"""Pages about a run for people: the report, which is written to a file, and the explorer, which is served."""
