"""Every setting: what there is, how it is read and written, the command line. Knows nothing of torch."""
