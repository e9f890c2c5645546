"""The optimizer stage: log-probabilities, KL, loss, gradients, beta."""
