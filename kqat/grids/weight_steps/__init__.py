"""Ways to find the step of a weight's grid, one file each."""
