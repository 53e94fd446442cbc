"""What this machine does best: its memory allocator set, its device, its fastest sound precision."""

from __future__ import annotations

import ctypes
import functools
import platform
import time

import torch
from torch import nn

from .types import UserError

PRECISIONS = ("auto", "fp32", "bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of returning them to the system after every tensor; True where it took.

    By default every tensor above 32 MB is mapped afresh, and the page faults cost more than many convolutions.
    Resident memory grows by 10-30%. Elsewhere than Linux with glibc nothing happens.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(M_MMAP_MAX, 0))


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


@functools.cache
def bf16_speedup() -> float:
    """How many times faster than fp32 one of the network's 3x3 convolutions runs in bf16 here; takes about 50 ms.

    Processors differ in kind: some multiply bfloat16 at three times the rate of fp32, some at half of it.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        conv = nn.Conv2d(80, 80, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = torch.ones(1, 80, 128, 128, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            conv(x)
            rounds = []
            for _ in range(3):
                start = time.perf_counter()
                conv(x)
                rounds.append(time.perf_counter() - start)
        seconds[dtype] = min(rounds)
    return seconds[torch.float32] / seconds[torch.bfloat16]
