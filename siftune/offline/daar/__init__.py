"""DaaR, arXiv 2502.04380: centroids, clusters, probes, selector."""
