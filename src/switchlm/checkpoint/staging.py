"""Copies of the tensors to save, so that training continues while they are written.

Training pauses only for one copy of this rank's part:
- on a CPU, to buffers that are kept from save to save, since new pages are slow to allocate;
- on an accelerator with enough free memory, to that memory, a hundred times as fast as over the
  bus; from there to pinned CPU memory on a stream of its own, in the background;
- else from the accelerator to pinned CPU memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Staging:
    """Buffers in CPU memory for the tensors that this rank saves."""

    def __init__(self) -> None:
        self._buffers: Parts = {}

    def reserve(self, parts: Mapping[str, Tensor]) -> None:
        """Allocate buffers for these tensors, which takes longer than copying them."""
        self._buffers = {name: self._buffer(name, part) for name, part in parts.items()}

    @torch.no_grad()
    def copy(self, parts: Mapping[str, Tensor]) -> Callable[[], Parts]:
        """Copy the tensors, which may change as soon as this returns.

        Returns a function to call once, from any thread: it returns the copies, contiguous on the
        CPU, which are valid until the next call of `copy`.
        """
        devices = {part.device for part in parts.values() if part.device.type != "cpu"}
        if devices and all(_fits_in_memory(device, parts) for device in devices):
            copies = {name: part.clone() for name, part in parts.items()}
            copied = {device: _stream(device).record_event() for device in devices}

            def finish_copy() -> Parts:
                self.reserve(copies)
                for device, event in copied.items():
                    self._fetch(copies, device, event)
                for name, part in copies.items():
                    if part.device.type == "cpu":
                        self._buffers[name].copy_(part)
                copies.clear()
                return dict(self._buffers)

            return finish_copy
        self.reserve(parts)
        for name, part in parts.items():
            self._buffers[name].copy_(part, non_blocking=part.device.type != "cpu")
        for device in devices:
            _stream(device).synchronize()
        return lambda: dict(self._buffers)

    @torch.no_grad()
    def _fetch(self, copies: Parts, device: torch.device, copied: Any) -> None:
        """Copy from a device to the buffers, after the event `copied`, on a stream of its own."""
        module = torch.get_device_module(device)
        with module.device(device), module.stream(module.Stream(device)):
            module.current_stream(device).wait_event(copied)
            for name, part in copies.items():
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
            buffer.view(-1).view(torch.uint8)[::4096].zero_()  # a write allocates the page
        return buffer


def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device).current_stream(device)


def _fits_in_memory(device: torch.device, parts: Mapping[str, Tensor]) -> bool:
    """Whether the device has twice the memory of the copies free: half is left for training."""
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    if mem_get_info is None:
        return False
    free: int = mem_get_info(device)[0]
    return free > 2 * sum(part.nbytes for part in parts.values() if part.device == device)
