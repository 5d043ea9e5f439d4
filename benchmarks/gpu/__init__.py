"""Benchmarks that need a GPU. Nothing of Ray is imported."""
