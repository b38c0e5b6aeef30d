"""What happens to images on their way to the network, in whole batches, from each sample's key."""
