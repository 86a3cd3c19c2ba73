"""Range methods: how the range of an activation is found, one module each."""
