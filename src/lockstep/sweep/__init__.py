"""Sweeps: many trainings of one file of W&B's form, without a W&B server."""
