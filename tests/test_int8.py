"""Convolutions in 8-bit integers: close to the float ones, the same for every tile, only where they fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from nuguide import machine
from nuguide.networks import build_network, fold_batch_norm
from nuguide.networks.int8 import InputRanges, Int8Conv, int8_available, quantizable, quantized, to_int8
from nuguide.types import UserError

pytestmark = pytest.mark.skipif(not int8_available(), reason="this build of torch has no oneDNN")


def test_a_value_is_off_by_at_most_half_a_step_of_input_and_weight() -> None:
    # one weight of 1 in the middle: the output is the input rounded to 255 steps between 0 and 10
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, 1, 1] = 1.0
    x = torch.linspace(0, 10, 64).view(1, 1, 8, 8)
    found = Int8Conv(conv, 0.0, 10.0, relu=False)(x)
    assert (found - x).abs().max() <= 10 / 255 / 2 + 1e-4


def test_what_lies_beyond_the_range_is_clipped_and_relu_is_applied() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, 1, 1] = 1.0
    x = torch.tensor([-8.0, -1.0, 0.0, 4.0]).view(1, 1, 2, 2)
    assert Int8Conv(conv, -2.0, 2.0, relu=False)(x).ravel().tolist() == pytest.approx([-2.0, -1.0, 0.0, 2.0], abs=0.02)
    assert Int8Conv(conv, -2.0, 2.0, relu=True)(x).ravel().tolist() == pytest.approx([0.0, 0.0, 0.0, 2.0], abs=0.02)


@pytest.mark.parametrize("name", ["unet", "unet3plus", "eunet3plus"])
def test_a_network_in_8_bits_keeps_its_probabilities_within_a_few_percent(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 2, width=4)
    image = torch.rand(4, 3, 64, 64) * 255
    for _ in range(5):
        network.train()(image)                        # so that batch norm has seen something
    network.eval()
    with torch.inference_mode():
        with InputRanges(network) as seen:
            expected = network(image).sigmoid()
        fold_batch_norm(network)
        to_int8(network, seen.ranges)
        found = network(image).sigmoid()
        alone = network(image[:1]).sigmoid()
    assert set(seen.ranges) == set(quantizable(network))
    assert 0 < (found - expected).abs().mean() < 0.02
    assert torch.equal(alone, found[:1])              # ranges are fixed: a tile does not depend on its batch


def test_a_convolution_without_a_range_stays_as_it_is() -> None:
    network = fold_batch_norm(build_network("unet", 2, width=4).eval())
    to_int8(network, {"encoder.levels.0.1": (0.0, 1.0)})
    changed = [name for name, place in quantizable(network).items() if isinstance(getattr(*place), Int8Conv)]
    assert changed == ["encoder.levels.0.1"]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_steps_are_what_the_formula_says_in_any_layout(memory: torch.memory_format) -> None:
    x = (torch.arange(-12, 12).float() / 4).view(1, 2, 3, 4).contiguous(memory_format=memory)
    steps = quantized(x, 0.32, 3)                     # no multiple of half a step
    assert steps.dtype == torch.uint8
    assert torch.equal(steps, ((x / 0.32).round() + 3).clamp(0, 255).to(torch.uint8))


def test_what_reads_the_image_stays_in_floats_folded_or_not() -> None:
    network = build_network("eunet3plus", 2, width=4).eval()
    before = set(quantizable(network))
    assert "encoder.levels.0.0" not in before
    assert "encoder.levels.0.1" in before
    assert set(quantizable(fold_batch_norm(network))) == before


def note(kinds: set, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    kinds.add(inputs[0].dtype)


def test_maps_between_convolutions_stay_in_8_bits_where_both_know_their_range() -> None:
    torch.manual_seed(0)
    network = build_network("eunet3plus", 2, width=4).eval()
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        with InputRanges(network) as seen:
            network(image)
        kinds: dict[str, set] = {}
        to_int8(fold_batch_norm(network), seen.ranges)
        for name, part in network.named_modules():
            if isinstance(part, Int8Conv):
                part.register_forward_pre_hook(partial(note, kinds.setdefault(name, set())))
        network(image)
    stays = {
        name for name, seen_kinds in kinds.items()
        if seen_kinds == {torch.uint8} and not name.endswith(("value", "gate"))    # which share what they take in
    }
    assert stays == {"head", *(f"merges.{level}.conv" for level in range(4))}
    # a merge that keeps its floats leaves its skips theirs
    network = fold_batch_norm(build_network("eunet3plus", 2, width=4).eval())
    to_int8(network, {name: span for name, span in seen.ranges.items() if name != "merges.1"})
    parts = dict(network.named_modules())
    assert parts["skips.1.1.conv"].out_scale is None
    assert parts["skips.2.2.conv"].out_scale == parts["merges.2.conv"].scale


def test_int8_is_taken_where_it_is_fastest_and_refused_without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="--precision int8: needs a CPU"):
        machine.choose_arithmetic("int8", cpu, has_int8=False)
    with pytest.raises(UserError, match="unknown precision 'int4'; choose from auto, fp32, bf16, int8"):
        machine.choose_arithmetic("int4", cpu, has_int8=True)
    monkeypatch.setattr(machine, "bf16_speedup", lambda: 1.5)
    monkeypatch.setattr(machine, "int8_speedup", lambda: 2.5)
    assert machine.choose_arithmetic("auto", cpu, has_int8=True) == "int8"
    assert machine.choose_arithmetic("auto", cpu, has_int8=False) == "bf16"
    monkeypatch.setattr(machine, "int8_speedup", lambda: 1.4)
    assert machine.choose_arithmetic("auto", cpu, has_int8=True) == "bf16"
