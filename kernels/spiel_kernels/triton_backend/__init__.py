"""Triton kernels and what launches them; imported only where Triton runs."""
