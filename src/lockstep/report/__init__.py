"""What is left of a run when it ends: summary, figures, predictions."""
