"""The Triton backend's kernels."""
