"""Rounding on a device: the twin of `lorakit.math.cast.narrow` and `lorakit.math.rounding` for
tensors of torch.

Law: `narrowed` gives the bits of `narrow`, and after `sum_to_odd` those of `round_sum` (a NaN stays
a NaN, but may change its payload and sign). torch's own conversions from float32 round once, to
nearest even; what comes to float32 from more bits is therefore rounded to odd, which keeps what the
second rounding has to know.

The error of a sum is had without wider numbers: Knuth, TAOCP 2, section 4.2.2, theorem B.
"""

from typing import Any

Tensor = Any  # of torch

_BEYOND_E4M3 = 464.0  # half-way from 448, the largest, to where 480 would be; itself it is a tie


def narrowed(x: Tensor, dtype: Any) -> Tensor:
    """`x`, float32 or float64, rounded once and to nearest even to a float dtype of torch."""
    import torch

    if dtype == torch.float8_e4m3fn:  # some versions of torch make 448 of what is beyond
        x = torch.where(x.abs() > _BEYOND_E4M3, torch.nan, x)
    return (_to_odd(x) if x.itemsize == 8 and dtype.itemsize < 4 else x).to(dtype)


def _to_odd(x: Tensor) -> Tensor:
    """float64 cut to float32, its last bit set where something was cut off.

    Both have the same sign, so comparing their bits as integers compares magnitudes.
    """
    import torch

    near = x.to(torch.float32)
    back, exact = near.to(torch.float64).view(torch.int64), x.view(torch.int64)
    bits = near.view(torch.int32)
    bits -= (back > exact).to(torch.int32)
    bits |= (back != exact).to(torch.int32)
    return near


def sum_to_odd(total: Tensor, w: Tensor, change: Tensor) -> None:
    """Make the sums `total = w + change`, float32, those that are rounded to odd. In place: of the
    rounded ones, the even move to the next float32 on their true side.
    """
    import torch

    bits = total.view(torch.int32)
    error = _error(total, w, change)
    outward = (error > 0) == (total > 0)
    step = outward.to(torch.int32).mul_(2).sub_(1)
    step *= (bits & 1 == 0) & (error != 0) & torch.isfinite(error)
    bits += step


def _error(total: Tensor, w: Tensor, change: Tensor) -> Tensor:
    """`w + change - total`, which float32 can hold."""
    rest = total - w
    other = (total - rest).neg_().add_(w)
    return rest.neg_().add_(change).add_(other)
