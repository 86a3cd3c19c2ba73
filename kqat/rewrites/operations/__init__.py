"""`keras.ops` functions as layers, one module a family."""
