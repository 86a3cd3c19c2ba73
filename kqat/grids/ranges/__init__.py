"""Ways to find the range of an activation, one file each."""
