"""Layers as simpler layers, one module a family."""
