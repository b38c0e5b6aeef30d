"""The pieces of gpu.py, each a function of a `Place` that returns what it found."""
