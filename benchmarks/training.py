"""How long a training step takes in bf16 and in fp32, side by side.

    python benchmarks/training.py [--width 16] [--batch 8] [--patch-px 128] [--rounds 10] [--threads 1]

The default network and guide, with the loss and the optimizer of `nuguide train`, on patches drawn at random; forward,
backward and update, by turns in the one precision and the other. Prints one JSON line: medians of the processor's
seconds, which other work on the machine disturbs less than the clock's, their ratio, and what `--precision auto` takes
here and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import torch

from nuguide import checkpoint
from nuguide.experiments.run import processor
from nuguide.guides import load_guide
from nuguide.losses import dice_focal
from nuguide.machine import bf16_speedup, choose_precision, keep_freed_memory
from nuguide.networks import fold_batch_norm
from nuguide.recipe import TrainOptions
from nuguide.start import model_spec
from nuguide.train import Training

GUIDE = "efficientnet_lite0"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(options: TrainOptions, rounds: int) -> dict[str, float]:
    """Median of the processor's seconds of a step in each precision."""
    keep_freed_memory()
    guide = load_guide(GUIDE).eval()
    fold_batch_norm(guide)
    model = checkpoint.build(model_spec(options, guide, [], []), guide.channels)
    training = Training(model.to(memory_format=torch.channels_last), guide, options).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    image = 255 * torch.rand(options.batch, 3, options.patch_px, options.patch_px)
    target = (image[:, :2] > 128).float()
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for turn in range(rounds + 1):                  # the first warms up
        for name, dtype in PRECISIONS.items():
            start = time.process_time()
            with torch.autocast("cpu", dtype, enabled=name == "bf16"):
                loss = dice_focal(training(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch-px", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asked = {name: getattr(args, name) for name in ("width", "batch", "patch_px")}
    seconds = measure(dataclasses.replace(TrainOptions(guide=GUIDE), **asked), args.rounds)
    print(json.dumps({
        **asked,
        "rounds": args.rounds,
        "threads": args.threads,
        "seconds_a_step": {name: round(value, 3) for name, value in seconds.items()},
        "fp32_over_bf16": round(seconds["fp32"] / seconds["bf16"], 2),
        "auto": str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch."),
        "convolution_fp32_over_bf16": round(bf16_speedup(), 2),
        "torch": torch.__version__,
        "processor": processor("cpu"),
    }))


if __name__ == "__main__":
    main()
