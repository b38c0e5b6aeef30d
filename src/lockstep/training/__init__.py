"""What a step is made of, and how far training has come."""
