"""Clusters: where a run runs."""
