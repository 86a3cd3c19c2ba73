"""Rewrites of `keras.ops` functions as layers, one module per family of functions."""
