"""Exact metrics of a network on a set."""
