"""Clusters: check a cluster file, reach the head, send jobs, examine the nodes, choose spot machines."""
