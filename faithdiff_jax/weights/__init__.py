"""Published tensors to our parameters and back, and model directories on disk."""
