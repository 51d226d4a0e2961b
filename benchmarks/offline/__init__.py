"""Kernels compiled, and programs run, for GPUs that are not there."""
