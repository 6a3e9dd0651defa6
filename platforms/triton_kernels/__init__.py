"""Portable Triton kernels: one source for every kind of device that Triton compiles for, tuned by
the table `tuning.toml`. Triton itself is imported by `register_triton`, and not before."""
