"""Data sets by kind, one file a kind."""
