"""Clusters: check a cluster file, connect to the head, send jobs, examine the nodes, and prefer spot machines."""
