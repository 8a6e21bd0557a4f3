"""Cross entropy of logits and integer labels, and its backward pass, without the probabilities."""
