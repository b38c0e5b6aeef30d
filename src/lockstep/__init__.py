"""Lockstep: the same image-classification training on every launch."""
