"""Training scripts, one per experiment, and the data and networks that they use."""
