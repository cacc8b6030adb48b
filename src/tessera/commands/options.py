"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import torch
import typer

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
"""How tables call a dtype."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def dtype_named(name: str) -> str:
    """A dtype's name, checked; typer shows the message and ends with exit code 2."""
    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is no dtype that attention runs in; use one of {', '.join(DTYPES)}")
    return name


def _each_dtype(names: str | list[str] | None) -> str | list[str] | None:
    for name in [names] if isinstance(names, str) else names or []:
        dtype_named(name)
    return names


def DtypeOption(help: str) -> Any:
    """--dtype, checked; given once or (for a list) several times."""
    return typer.Option("--dtype", metavar="|".join(DTYPES), help=help, callback=_each_dtype)


def usable_device(name: str) -> str:
    """A device of this machine, checked."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"{name!r}: {str(error).splitlines()[0]}; use cpu" + _gpus()) from error
    return name


def _gpus() -> str:
    return "".join(f" or cuda:{i}" for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ""


DeviceOption: Any = typer.Option("--device", help="A device of this machine: cpu, cuda, cuda:1.", callback=usable_device)
