"""Step methods: how the step of a weight's grid is found, one module each."""
