"""How fast `nuguide segment` is on a 2000 x 2000 px image at 40x, and where its time goes.

    python benchmarks/speed.py [--model NAME|FOLDER] [--image FILE] [--rounds N] [--threads N]

Both sides run in one process, by turns: the default path, and the same model as plain eager fp32 (contiguous tensors,
batch norm unfolded, skips enlarged before they are convolved) with the same tiles, allocator setting, separation and
export. Prints one JSON line: seconds (medians over rounds), their ratio, seconds per megapixel and share of every
stage, agreement of the two label maps, the network's share of this machine's measured convolution peak, peak memory of
a `nuguide segment` process, and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nuguide import checkpoint
from nuguide.image_run import ENDINGS, write_results
from nuguide.images import Image, read_image
from nuguide.instances import enlarge
from nuguide.metrics import dice
from nuguide.networks.blocks import UpConvUnit
from nuguide.networks.int8 import Int8Conv
from nuguide.nuclei import Nuclei
from nuguide.predict import Predictor
from nuguide.resample import resize_map

MPP = 0.25
STAGES = ("read", "guide", "network", "instances", "measure", "export")


class PlainUp(nn.Module):
    """`UpConvUnit` as it is usually written: enlarge, then convolve."""

    def __init__(self, unit: UpConvUnit):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.unit.scale, mode="bilinear", align_corners=False)
        return self.unit.activation(self.unit.norm(self.unit.conv(x)))


class PlainPredictor(Predictor):
    """The same model without any of the preparation: NCHW, fp32, nothing folded or rearranged."""

    def __init__(self, model: nn.Module, guide: nn.Module | None, spec: checkpoint.ModelSpec):
        super().__init__(nn.Identity(), None, spec, device="cpu", precision="fp32")
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, UpConvUnit):
                    setattr(module, name, PlainUp(child))
        self.model, self.guide = model.eval(), guide

    def _on_device(self, image: Tensor) -> Tensor:
        return image.float().contiguous()


class Clock:
    """Adds up the seconds of named stages; `network` is what the tiles take less the guide's part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, stage: str, function: Callable, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[stage] += time.perf_counter() - start
        return result


def segment(predictor: Predictor, file: Path, stem: Path) -> tuple[Nuclei, Clock]:
    """What `nuguide segment` does to one file, stage by stage."""
    clock = Clock()
    image = clock.timed("read", read_image, file).image_rgb
    small = clock.timed("read", predictor.prepared, image, MPP)
    guide = predictor.guide
    if guide is not None:
        predictor.guide = lambda x: clock.timed("guide", guide, x)  # pyright: ignore[reportAttributeAccessIssue]
    nucleus, interior = clock.timed("network", predictor.probabilities, small)
    clock.seconds["network"] -= clock.seconds["guide"]
    predictor.guide = guide
    labels = clock.timed("instances", predictor.label, nucleus, interior)
    fine = clock.timed("instances", enlarge, labels, nucleus, image.shape[:2], predictor.separation.nucleus)
    large = clock.timed("instances", resize_map, nucleus, fine.shape)
    nuclei = clock.timed("measure", Nuclei.found, fine, image, large, MPP)
    clock.timed("export", write_results, nuclei, Image(image), stem, tuple(ENDINGS))
    return nuclei, clock


def large_image(path: Path) -> Path:
    """A 2000 x 2000 px picture: four real ones side by side where they are there, else drawn tissue."""
    root = Path(__file__).resolve().parents[1]
    real = sorted((root.parent / "shared/data/monuseg/images").glob("*"))[:4]
    if len(real) == 4:
        parts = [read_image(file).image_rgb for file in real]
    else:
        sys.path.insert(0, str(root / "tests"))
        from conftest import draw_tissue  # pyright: ignore[reportMissingImports]

        parts = [draw_tissue(seed, (1000, 1000), 600, (14, 24))[0] for seed in range(4)]
    picture = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return path


def convolution_peak(arithmetic: str) -> float:
    """The highest rate, in G operations/s, of a few 3x3 convolutions in this arithmetic."""
    best = 0.0
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    for channels, side in ((80, 256), (128, 128), (256, 64)):
        conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore
        if arithmetic == "int8":
            conv = Int8Conv(conv, 0.0, 1.0, relu=False)  # pyright: ignore[reportArgumentType]
        x = torch.rand(4, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            conv(x)
            for _ in range(5):
                start = time.perf_counter()
                conv(x)
                best = max(best, 2 * 9 * channels**2 * 4 * side**2 / (time.perf_counter() - start) / 1e9)
    return best


def network_rate(predictor: Predictor, model: str, rounds: int) -> tuple[float, float]:
    """(G operations of one 256 px tile, G operations/s) of the network without its guide, on a batch of four.

    Operations are counted on the model in fp32, for the counter does not know 8-bit convolutions.
    """
    image = torch.rand(4, 3, 256, 256).mul(255).contiguous(memory_format=torch.channels_last)
    floats = Predictor(*checkpoint.load(model), device="cpu", precision="fp32")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=predictor.precision == "bf16"):
        inputs = (image,) if predictor.guide is None else (image, predictor.guide(image))
        with FlopCounterMode(display=False) as counter:
            floats.model(*inputs)
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            predictor.model(*inputs)
            seconds.append(time.perf_counter() - start)
    flop = counter.get_total_flops()
    return flop / 4 / 1e9, flop / min(seconds) / 1e9


def peak_memory_mb(model: str, file: Path, out: Path) -> float:
    """Resident megabytes at the highest point of `nuguide segment` on the file."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom nuguide.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    status = Path('/proc/self/status')\n"
        "    if status.exists(): print('PEAK_KB', status.read_text().split('VmHWM:')[1].split()[0])\n"
        "    else: print('PEAK_KB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, "segment", str(file), "--out", str(out), "--mpp", str(MPP), "--model", model]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(text.split("PEAK_KB")[1]) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides: dict[str, Predictor] = {
        "default": Predictor(*checkpoint.load(options.model), device="cpu"),
        "plain": PlainPredictor(*checkpoint.load(options.model)),
    }
    clocks: dict[str, list[Clock]] = {"default": [], "plain": []}
    found: dict[str, Nuclei] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = options.image or large_image(Path(folder) / "image.png")
        for predictor in sides.values():
            segment(predictor, file, Path(folder) / "warm")
        for _ in range(options.rounds):
            for name, predictor in sides.items():
                found[name], clock = segment(predictor, file, Path(folder) / name)
                clocks[name].append(clock)
        memory = peak_memory_mb(options.model, file, Path(folder) / "out")
    total = {name: float(np.median([sum(c.seconds.values()) for c in runs])) for name, runs in clocks.items()}
    megapixels = found["default"].labels.size / 1e6
    stages = {stage: float(np.median([c.seconds[stage] for c in clocks["default"]])) for stage in STAGES}
    plain = {stage: float(np.median([c.seconds[stage] for c in clocks["plain"]])) for stage in STAGES}
    precision = sides["default"].precision
    peak = convolution_peak(precision)
    gflop, rate = network_rate(sides["default"], options.model, options.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({
        "benchmark": "speed",
        "image_px": found["default"].labels.shape,
        "nuclei": len(found["default"]),
        "seconds": {name: round(value, 2) for name, value in total.items()},
        "times_faster": round(total["plain"] / total["default"], 2),
        "label_dice": round(dice(found["plain"].labels > 0, found["default"].labels > 0), 5),
        "seconds_per_megapixel": {stage: round(value / megapixels, 4) for stage, value in stages.items()},
        "share": {stage: round(value / sum(stages.values()), 3) for stage, value in stages.items()},
        "plain_seconds_per_megapixel": {stage: round(value / megapixels, 4) for stage, value in plain.items()},
        "network": {"gop_per_256px_tile": round(gflop, 1), "gops": round(rate), "conv_peak_gops": round(peak),
                    "share_of_peak": round(rate / peak, 2), "precision": precision},
        "peak_memory_mb": round(memory),
        "rounds": options.rounds, "threads": options.threads, "torch": torch.__version__,
        "machine": platform.machine(), "commit": commit,
    }))


if __name__ == "__main__":
    main()
