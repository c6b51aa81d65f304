"""Where stages run: profiles of clusters, the graph as jobs, what Slurm says of them."""
