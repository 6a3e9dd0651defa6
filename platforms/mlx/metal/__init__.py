"""Kernels written in Metal's language, run through `mx.fast.metal_kernel`.

Each file holds one kernel: its source, and the function that launches it. A source names no address
space: MLX puts small inputs into another one than large inputs, so only `auto` fits both.
"""
