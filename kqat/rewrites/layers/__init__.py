"""Rewrites of layers as simpler layers, one module per family of layers."""
