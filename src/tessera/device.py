"""What a plan needs to know of a device, as plain data: so that a plan can be made for a GPU that is not here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from tessera.errors import bad_value


@dataclass(frozen=True)
class Device:
    """A device as the planners see it.

    `kind` is torch's device type ("cpu", "cuda", ...). `capability` is CUDA's compute capability, (0, 0) elsewhere.
    `multiprocessors` is the number of SMs; on a CPU the number of threads torch uses.
    """

    kind: str
    name: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 1

    def __str__(self) -> str:
        if self.kind != "cuda":
            return self.name
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]}, {self.multiprocessors} SMs)"

    @staticmethod
    def of(device: torch.device) -> Device:
        """The description of a torch device of this machine; reads CUDA's properties once for each GPU."""
        index = device.index
        if device.type == "cuda" and index is None:
            index = torch.cuda.current_device()
        return _describe(device.type, index)

    @staticmethod
    def named(name: str) -> Device:
        """A device by name, present or not: "h100", "h200", "cpu", or any string torch.device takes."""
        if name in KNOWN_DEVICES:
            return KNOWN_DEVICES[name]
        try:
            return Device.of(torch.device(name))
        except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
            known = ", ".join(sorted(KNOWN_DEVICES))
            raise bad_value("device", repr(name), str(error).splitlines()[0], f"use a torch device or {known}") from error


@cache
def _describe(kind: str, index: int | None) -> Device:
    if kind == "cpu":
        return Device("cpu", "CPU", multiprocessors=torch.get_num_threads())
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        return Device("cuda", properties.name, capability, properties.multi_processor_count)
    return Device(kind, kind)


KNOWN_DEVICES = {
    "cpu": Device("cpu", "CPU", multiprocessors=torch.get_num_threads()),
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132),
    "h200": Device("cuda", "NVIDIA H200", (9, 0), 132),
    "a100": Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 108),
}
