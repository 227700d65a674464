"""Devices of torch, by the names that `--device` has for them, and the way there and back.

Three streams lead through a GPU, so that it copies in, computes and copies out at the same time;
events keep what depends on each other in order. torch's own CPU ("torch:cpu") has the same calls,
each done when it returns: what is said of scheduling can be tested without a GPU.

Memory belongs to the stream that it was allocated on: what is copied in to the first, everything
else to the second. Nothing of it may be dropped before `Passage.leave` or `settled` has returned.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lorakit.errors import UsageError
from lorakit.math.cast import Array, bytes_of, code_of
from lorakit.tensors import NAMES

Tensor = Any  # of torch
NAME = re.compile(r"cpu|cuda(:(?P<index>\d+))?|torch:cpu")
FULL = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")


class Device:
    """torch's CPU, and what a GPU has in common with it."""

    def __init__(self, where: str = "cpu", name: str = "torch:cpu") -> None:
        self.torch = _torch()
        self.where = self.torch.device(where)
        self.place = f"torch:{where}"
        self.name = name
        self.submitting = threading.Lock()  # one at a time, so that only one needs room for it

    @staticmethod
    def parse(text: str) -> "Device":
        """The device that a text means; the first of several.

        Raises:
            UsageError: as for `devices`.
        """
        return devices(text)[0]

    def dtype(self, code: str) -> Any:
        """What torch calls the dtype with this code in safetensors."""
        return getattr(self.torch, NAMES[code])

    def to_device(self, array: Array) -> Tensor:
        """A tensor on the device with the numbers of an array of any storage dtype."""
        host = self.staging(array.nbytes)
        host.numpy()[:] = bytes_of(array)
        return self._sent(host).view(self.dtype(code_of(array.dtype))).reshape(array.shape)

    def _sent(self, host: Tensor) -> Tensor:
        """What lies in staging memory, on the device and for good."""
        return host

    def staging(self, nbytes: int) -> Tensor:
        """Memory of the host, (nbytes,) uint8, that copies need not wait for."""
        return self.torch.empty(nbytes, dtype=self.torch.uint8)

    def passage(self) -> "Passage":
        """One way in and out for one thread."""
        return Passage(self)

    def free_memory(self) -> int:
        """Bytes that could be allocated."""
        from lorakit.engine.machine import available_memory

        return available_memory()

    def is_full(self, error: RuntimeError) -> bool:
        """Whether an error of torch says that there is no memory left."""
        said = str(error).lower()
        return isinstance(error, self.torch.OutOfMemoryError) or any(t in said for t in FULL)

    def give_back(self) -> None:
        """Wait for everything, and let go of memory that is kept for later."""

    def limited(self, nbytes: int | None) -> AbstractContextManager[object]:
        """No more than so many bytes are allocated within; torch's CPU knows no such limit."""
        return nullcontext()


class Passage:
    """One way in and out of a device, where each step is done when it returns."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def enter(self, host: Tensor) -> Tensor:
        """A copy on the device of what lies in staging memory."""
        return host.clone()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What is computed within comes after what has entered."""
        with self.device.submitting:
            yield

    def leave(self, tensor: Tensor, host: Tensor) -> None:
        """Copy what was computed to the host, and wait until it is there."""
        host.copy_(tensor)

    def settled(self) -> None:
        """Wait until all that was computed is."""


class Cuda(Device):
    """A GPU with its three streams."""

    def __init__(self, index: int) -> None:
        torch = _torch()
        super().__init__(f"cuda:{index}", torch.cuda.get_device_name(index))
        self.copy_in, self.compute, self.copy_out = (
            torch.cuda.Stream(self.where) for _ in range(3)
        )

    def _sent(self, host: Tensor) -> Tensor:
        """What lies in staging memory, on the device and for good."""
        passage = CudaPassage(self)
        raw = passage.enter(host)
        passage.entered.synchronize()
        for stream in (self.compute, self.torch.cuda.current_stream(self.where)):
            raw.record_stream(stream)  # nobody says when it is dropped
        return raw

    def staging(self, nbytes: int) -> Tensor:
        """Page-locked memory, (nbytes,) uint8."""
        with self.torch.cuda.device(self.where):
            return self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=True)

    def passage(self) -> Passage:
        """One way in and out for one thread."""
        return CudaPassage(self)

    def free_memory(self) -> int:
        """Bytes that could be allocated."""
        return int(self.torch.cuda.mem_get_info(self.where)[0])

    def give_back(self) -> None:
        """Wait for everything, and let go of memory that is kept for later."""
        self.torch.cuda.synchronize(self.where)
        self.torch.cuda.empty_cache()

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """No more than so many bytes are allocated within, of which others may hold some."""
        if nbytes is None:
            yield
            return
        cuda = self.torch.cuda
        total = cuda.get_device_properties(self.where).total_memory
        before = getattr(cuda, "get_per_process_memory_fraction", lambda _: 1.0)(self.where)
        cuda.set_per_process_memory_fraction(min(before, nbytes / total), self.where)
        try:
            yield
        finally:
            cuda.set_per_process_memory_fraction(before, self.where)


class CudaPassage(Passage):
    """One way through the streams of a GPU: events order what enters, is computed and leaves."""

    device: Cuda

    def __init__(self, device: Cuda) -> None:
        super().__init__(device)
        # Blocking: who waits leaves the core to readers and writers.
        self.entered, self._computed, self._left = (
            device.torch.cuda.Event(blocking=True) for _ in range(3)
        )

    def enter(self, host: Tensor) -> Tensor:
        """A copy of page-locked memory, under way."""
        torch, stream = self.device.torch, self.device.copy_in
        with torch.cuda.stream(stream):
            raw = torch.empty_like(host, device=self.device.where)
            raw.copy_(host, non_blocking=True)
            self.entered.record(stream)
        return raw

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What is asked for within comes after what has entered."""
        stream = self.device.compute
        with self.device.submitting, self.device.torch.cuda.stream(stream):
            stream.wait_event(self.entered)
            yield
            self._computed.record(stream)

    def leave(self, tensor: Tensor, host: Tensor) -> None:
        """Copy what was computed to page-locked memory, and wait until it is there."""
        stream = self.device.copy_out
        with self.device.torch.cuda.stream(stream):
            stream.wait_event(self._computed)
            host.copy_(tensor, non_blocking=True)
            self._left.record(stream)
        self._left.synchronize()

    def settled(self) -> None:
        """Wait until all that was computed is."""
        self._computed.synchronize()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are products of float32 within, and not of TF32."""
    matmul = _torch().backends.cuda.matmul
    # torch 2.9 and later refuse a mixture of the old setting and the new.
    new = hasattr(matmul, "fp32_precision")
    setting, full = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, full)
    try:
        yield
    finally:
        setattr(matmul, setting, before)


def devices(text: str) -> list[Device]:
    """The devices that a text means: "cuda:1" one, "cuda" all that there are.

    "torch:cpu" is torch's CPU, for tests of what is said of GPUs; "cpu" is no device of torch.

    Raises:
        UsageError: no such device, or no torch that could use it.
    """
    found = NAME.fullmatch(text)
    if not found or text == "cpu":
        raise UsageError(f"{text!r} is no device.", hint="Name cpu, cuda or cuda:N.")
    if text == "torch:cpu":
        return [Device()]
    count = _count(text)
    if found["index"] is None:
        return [Cuda(n) for n in range(count)]
    if int(found["index"]) >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count))
        raise UsageError(f"there is no {text}.", hint=f"There are: {there}.")
    return [Cuda(int(found["index"]))]


def _count(text: str) -> int:
    torch = _torch(text)
    count: int = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = torch.version.cuda
        how = f"(for CUDA {built}) finds no device" if built else "is built without CUDA"
        hint = "Check the driver with nvidia-smi" if built else "Install a build of torch with CUDA"
        raise UsageError(
            f"--device {text}: the installed torch {torch.__version__} {how}.",
            hint=f"{hint}, or leave --device out.",
        )
    return count


def _torch(text: str = "torch:cpu") -> Any:
    try:
        import torch
    except ImportError as e:
        raise UsageError(
            f"--device {text} needs torch, which is not installed.",
            hint='Run `pip install "lorakit[torch]"`, or leave --device out.',
        ) from e
    return torch
