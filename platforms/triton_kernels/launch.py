"""What all wrappers share: how a tensor is seen as rows, and how a tile of rows is cut."""

from __future__ import annotations

from torch import Tensor

from .tuning import Tuning, power_of_two


def rows_of(x: Tensor) -> Tensor:
    """x (..., width) as (rows, width) with neighbouring columns and any stride between rows."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def heads_of(x: Tensor) -> Tensor:
    """x (T, heads, dim) with neighbouring dims; any other strides will do."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def row_tile(tuning: Tuning, rows: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a tile that holds whole rows, powers of two."""
    columns = power_of_two(width)
    most = max(1, tuning.row_elements // columns)
    return min(power_of_two(rows), most), columns


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)
