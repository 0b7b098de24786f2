"""Copies of the tensors to save, so that training goes on while they are written.

Training pauses for one copy of this rank's part, and it should be the quickest there is:
- on a CPU, into memory that is kept from save to save, since fresh pages are slow to get;
- on an accelerator with room for it, into its own memory, a hundred times as fast as over the bus;
  from there the copies go to pinned CPU memory on a stream of their own, in the background;
- on one without, straight to the pinned memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Staging:
    """The memory of the copies, as many bytes as this rank saves, in the CPU's memory."""

    def __init__(self) -> None:
        self._buffers: Parts = {}

    def reserve(self, parts: Mapping[str, Tensor]) -> None:
        """Get the memory for copies of such tensors, which takes longer than to copy them."""
        self._buffers = {name: self._buffer(name, part) for name, part in parts.items()}

    @torch.no_grad()
    def copy(self, parts: Mapping[str, Tensor]) -> Callable[[], Parts]:
        """Copy the tensors, which may change as soon as this returns.

        Returns a function to call, once, from any thread: it gives the copies, contiguous on the
        CPU, which hold until the next call of this.
        """
        devices = {part.device for part in parts.values() if part.device.type != "cpu"}
        if devices and all(_fits_in_memory(device, parts) for device in devices):
            held = {name: part.clone() for name, part in parts.items()}
            taken = {device: _stream(device).record_event() for device in devices}

            def land() -> Parts:
                self.reserve(held)
                for device, event in taken.items():
                    self._fetch(held, device, event)
                for name, part in held.items():
                    if part.device.type == "cpu":
                        self._buffers[name].copy_(part)
                held.clear()
                return dict(self._buffers)

            return land
        self.reserve(parts)
        for name, part in parts.items():
            self._buffers[name].copy_(part, non_blocking=part.device.type != "cpu")
        for device in devices:
            _stream(device).synchronize()
        return lambda: dict(self._buffers)

    @torch.no_grad()
    def _fetch(self, held: Parts, device: torch.device, taken: Any) -> None:
        """Copy what is on a device, once `taken` has happened there, past what it computes now."""
        module = torch.get_device_module(device)
        with module.device(device), module.stream(module.Stream(device)):
            module.current_stream(device).wait_event(taken)
            for name, part in held.items():
                if part.device == device:
                    self._buffers[name].copy_(part, non_blocking=True)
            module.current_stream(device).synchronize()

    def _buffer(self, name: str, part: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is not None and (known.shape, known.dtype) == (part.shape, part.dtype):
            return known
        pinned = part.device.type == "cuda"
        buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
        if not pinned:
            buffer.view(-1).view(torch.uint8)[::4096].zero_()  # pages come when they are written to
        return buffer


def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device).current_stream(device)


def _fits_in_memory(device: torch.device, parts: Mapping[str, Tensor]) -> bool:
    """Whether copies fit on the device, with as much left over for training to grow into."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    if ask is None:
        return False
    free: int = ask(device)[0]
    return free > 2 * sum(part.nbytes for part in parts.values() if part.device == device)
