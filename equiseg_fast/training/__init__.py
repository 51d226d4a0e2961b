"""Training: configuration, optimiser, checkpoints and the loop behind `equiseg_fast.train`."""
