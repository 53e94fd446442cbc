"""What this machine does best: its memory allocator set, its device, its fastest sound precision."""

from __future__ import annotations

import ctypes
import functools
import platform
import time

import torch
from torch import nn

from .networks.int8 import Int8Conv, int8_available
from .types import UserError

PRECISIONS = ("auto", "fp32", "bf16")          # to train in
ARITHMETICS = (*PRECISIONS, "int8")           # to segment in
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of returning them to the system after every tensor; True where it took.

    By default every tensor above 32 MB is mapped afresh, and the page faults cost more than many convolutions.
    Resident memory grows by 10-30%; that threads share one heap keeps it from growing with each of them. Elsewhere than
    Linux with glibc nothing happens.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(*one) for one in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)))


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one; raises UserError for a device that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA GPU; use --device cpu, or install torch with CUDA")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` takes bfloat16 on a GPU that has it, and on a CPU measured to gain a tenth by it."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; choose from {', '.join(PRECISIONS)}")
    if name == "auto":
        on_cpu = device.type == "cpu"
        faster = bf16_speedup() > 1.1 if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if faster else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def choose_arithmetic(name: str, device: torch.device, has_int8: bool) -> str:
    """`fp32`, `bf16` or `int8`, for inference; `auto` takes what is measured to be fastest here, if by a tenth.

    Args:
        has_int8: the model knows the ranges of its activations.

    Raises:
        UserError: int8 is asked for where the model, the device or this build of torch does not have it.
    """
    able = has_int8 and device.type == "cpu" and int8_available()
    if name == "int8" and not able:
        raise UserError(
            "--precision int8: needs a CPU, a torch built with oneDNN, and a model that knows its ranges "
            "(those that nuguide train writes do); use --precision auto"
        )
    if name == "int8" or (name == "auto" and able and int8_speedup() > max(1.1, bf16_speedup())):
        return "int8"
    if name not in ARITHMETICS:
        raise UserError(f"unknown precision {name!r}; choose from {', '.join(ARITHMETICS)}")
    return "bf16" if choose_precision(name, device) is torch.bfloat16 else "fp32"


@functools.cache
def bf16_speedup() -> float:
    """How many times faster than fp32 one of the network's 3x3 convolutions runs in bf16 here; takes about 50 ms.

    Processors differ in kind: some multiply bfloat16 at three times the rate of fp32, some at half of it.
    """
    return convolution_seconds("fp32") / convolution_seconds("bf16")


@functools.cache
def int8_speedup() -> float:
    """The same for 8-bit integers, the quantizing of the input included."""
    return convolution_seconds("fp32") / convolution_seconds("int8")


@functools.cache
def convolution_seconds(arithmetic: str) -> float:
    """Seconds of a 3x3 convolution 80 -> 80 of 128 x 128 px here: the least of three."""
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    conv: nn.Module = nn.Conv2d(80, 80, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if arithmetic == "int8":
        conv = Int8Conv(conv, 0.0, 1.0, relu=False)  # pyright: ignore[reportArgumentType]
    x = torch.ones(1, 80, 128, 128, dtype=dtype).contiguous(memory_format=torch.channels_last)
    rounds = []
    with torch.inference_mode():
        conv(x)
        for _ in range(3):
            start = time.perf_counter()
            conv(x)
            rounds.append(time.perf_counter() - start)
    return min(rounds)
