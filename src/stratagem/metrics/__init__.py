"""Measures of quality (Frechet distances) and of honesty (distance to the training images)."""
