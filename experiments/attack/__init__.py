"""Black-box attacks on an image classifier: the data, the attacked model, and its training."""
