"""One module for each `lockstep <command>`."""
