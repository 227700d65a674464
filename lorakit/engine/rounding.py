"""Rounding on a device: the twin of `lorakit.math.cast.narrow` and `lorakit.math.ties` for tensors
of torch.

Law: `narrowed` gives the bits of `narrow`, and `settle_ties` moves the numbers that
`lorakit.math.ties` moves (a NaN stays a NaN, but may change its payload and sign). torch's own
conversions from float32 round once, to nearest even; those from float64 go by way of float32, so
that step is to odd, which keeps what the second rounding has to know.

The error of a sum is had without wider numbers: Knuth, TAOCP 2, section 4.2.2, theorem B.
"""

from typing import Any

Tensor = Any  # of torch

_BELOW = 0x1FFF  # the bits of a float32 that a normal float16 has no room for
_HALF = 0x1000
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


def settle_ties(total: Tensor, w: Tensor, change: Tensor) -> None:
    """Move those of the sums `total = w + change`, float32, that look like ties of float16 to the
    next float32 on their true side. In place; a true tie stays one.
    """
    import torch

    bits = total.view(torch.int32)
    tied = (bits & _BELOW) == _HALF
    error = _error(total, w, change)
    outward = (error > 0) == (total > 0)
    step = outward.to(torch.int32).mul_(2).sub_(1)
    step *= tied & (error != 0) & torch.isfinite(error)
    bits += step


def _error(total: Tensor, w: Tensor, change: Tensor) -> Tensor:
    """`w + change - total`, which float32 can hold."""
    rest = total - w
    other = (total - rest).neg_().add_(w)
    return rest.neg_().add_(change).add_(other)
