"""Training data: degradation, sources, loader."""
