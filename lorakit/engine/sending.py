"""Where matrices are decomposed: here, or on devices of torch that they are sent to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from lorakit.errors import ResourceError
from lorakit.math.namespace import Send, here


@contextmanager
def sender(device: str) -> Iterator[Send]:
    """What brings arrays to a device ("cpu", "cuda" for each in turn, "cuda:N"), one and the same
    for each thread; within, products of float32 are not those of a narrower type.

    Raises:
        UsageError: no such device, or no torch that could use it.
        ResourceError: from within, where the device has no memory left.
    """
    if device == "cpu":
        yield here
        return
    from lorakit.engine.device import devices, full_precision

    found = devices(device)
    turns, seat = cycle(found), threading.local()

    def send(x: Any) -> Any:
        if not hasattr(seat, "device"):
            seat.device = next(turns)
        return seat.device.to_device(x)

    with full_precision():
        try:
            yield send
        except RuntimeError as error:
            if not any(d.is_full(error) for d in found):
                raise
            raise ResourceError(
                f"{device} has no memory left: {str(error).splitlines()[0]}",
                hint="Take fewer --jobs, or leave --device out.",
            ) from error
