"""The device and the precision that a machine is given."""

from __future__ import annotations

import platform

import pytest
import torch

from nuguide import machine
from nuguide.types import UserError

CPU = torch.device("cpu")


def test_explicit_precisions_are_respected_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bf16_speedup", lambda: pytest.fail("measured"))
    assert machine.choose_precision("fp32", CPU) is torch.float32
    assert machine.choose_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("speedup", "expected"), [(3.1, torch.bfloat16), (1.05, torch.float32), (0.4, torch.float32)])
def test_auto_takes_bf16_on_a_cpu_that_gains_a_tenth_by_it(
    speedup: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "bf16_speedup", lambda: speedup)
    assert machine.choose_precision("auto", CPU) is expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_takes_bf16_on_a_gpu_that_has_it(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(machine, "bf16_speedup", lambda: pytest.fail("measured the CPU"))
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert machine.choose_precision("auto", torch.device("cuda")) is expected


def test_the_speedup_is_measured_once() -> None:
    speedup = machine.bf16_speedup()
    assert 0.01 < speedup < 100
    assert machine.bf16_speedup() == speedup             # a second measurement would differ
    assert machine.choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_gpu_that_is_not_there_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this torch sees no CUDA GPU; use --device cpu"):
        machine.choose_device("cuda")
    assert machine.choose_device("auto") == CPU


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose_device("auto") == torch.device("cuda")
    assert machine.choose_device("cpu") == CPU


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(UserError, match="unknown device 'gpu'; choose from auto, cpu, cuda"):
        machine.choose_device("gpu")
    with pytest.raises(UserError, match="unknown precision 'fp16'; choose from auto, fp32, bf16"):
        machine.choose_precision("fp16", CPU)


def test_the_allocator_is_set_on_linux_with_glibc_only(monkeypatch: pytest.MonkeyPatch) -> None:
    glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    assert machine.keep_freed_memory() == glibc
    machine.keep_freed_memory.cache_clear()
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert machine.keep_freed_memory() is False
    machine.keep_freed_memory.cache_clear()
