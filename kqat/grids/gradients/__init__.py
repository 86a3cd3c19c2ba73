"""Gradient estimators: what stands for the derivative of rounding, one module each."""
