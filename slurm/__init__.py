"""Stages as jobs: profiles of clusters, the graph as jobs, and the states that Slurm reports."""
