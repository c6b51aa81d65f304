"""Pages about a run for people: the report, which is written to a folder, and the explorer, which is served."""
