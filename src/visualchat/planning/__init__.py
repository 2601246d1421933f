"""Memory and time of a training run, predicted before it starts."""
