"""Networks, and the weights that are put into them."""
