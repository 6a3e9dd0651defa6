"""2^x put together from MLX's sums, products and shifts.

MLX's CPU backend calls a scalar function of the C library for each power and each `exp`; its sums
and products have vectors. Where there are many elements, 16 passes of those take half the time.
"""

from __future__ import annotations

import mlx.core as mx

MANY = 1 << 15
"""With fewer elements the cost of 16 operations is more than what they save."""
LEAST, MOST = -127.0, 127.0
"""2^-127 comes out as 0."""
BIAS, MANTISSA = 127, 23
"""Of a float32: what is added to an exponent, and the bits below it."""
ROUND = float(3 << (MANTISSA - 1)) + BIAS
"""A float that is added to this is rounded to a whole number, biased, in the lowest bits."""
HALF = (0.3465728163719177, 0.06005684286355972, 0.0069508301094174385, 0.0006006269832141697)
"""2^(f/2) - 1 = f (c0 + f (c1 + ...)) for |f| <= 1/2: least largest relative error, 8.5e-8."""


def power_of_two(x: mx.array) -> mx.array:
    """2^x for x up to 127, of any shape; NaN stays NaN. In float32 the relative error is at most
    4e-7 where the result is a normal number, and below that the result is 0 or close to it."""
    if x.size < MANY or x.dtype != mx.float32:
        return mx.power(2.0, x)
    x = mx.minimum(mx.maximum(x, LEAST), MOST)
    whole = x + ROUND
    rest = x - (whole - ROUND)
    root = rest * HALF[3]
    for coefficient in HALF[2::-1]:
        root = (root + coefficient) * rest
    scale = (whole.view(mx.int32) << MANTISSA).view(mx.float32)
    return mx.square(root + 1.0) * scale
