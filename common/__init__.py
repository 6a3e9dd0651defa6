"""The hardware-neutral engine: requests, scheduling, caches, ops' contracts. No torch, no mlx."""
