"""What is adapted in a model, where, and how: units, projections, hooks, and a pass by shapes alone."""
