"""How many samples a second a training step takes, by width and size, on this machine: what a course is planned by.

On a CPU it counts the processor's time on one thread, which other work disturbs less than the clock. Knows a step's
arithmetic; the data are noise.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch

from training import architecture
from training.architecture import PROMPT_TOKENS
from training.arithmetic import short
from training.linear_start import start_unet
from training.second import machine
from training.second.course import TINY
from training.second.learn import Painter
from training.second.vocabulary import vocabulary

WIDTHS = ((32, 64, 128), (32, 32, 32, 64, 128), (32, 96, 192), (48, 96, 192), (64, 128, 256))
BATCHES = {"cpu": {16: 32, 32: 16, 64: 4}, "cuda": {16: 1536, 32: 768, 64: 256}}


def samples_a_second(widths: tuple[int, ...], side: int, place: torch.device, steps: int) -> float:
    """Forward, backward and optimiser on squares of so many latents."""
    torch.manual_seed(0)
    made, count = Painter(replace(TINY, widths=widths)), BATCHES[place.type][side]
    start_unet(made.unet)
    machine.suit(made.unet, place)
    machine.suit_readers((made.reader.first, made.reader.second), place)
    made.to(place)
    optimiser = torch.optim.AdamW(made.parameters(), 1e-4, fused=True)
    ids = torch.randint(0, len(vocabulary().used), (count, PROMPT_TOKENS), device=place)
    ids[:, -1] = vocabulary().marks[1]
    noisy = torch.randn(count, 4, side, side, device=place).contiguous(memory_format=torch.channels_last)
    levels, sizes = torch.randint(0, 1000, (count,), device=place), torch.full((count, 6), 512.0, device=place)
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    began = clock()
    for step in range(steps + 2):
        if step == 2:
            began = finished(clock, place)
        optimiser.zero_grad(set_to_none=True)
        with short(place):
            states, pooled = made.reader(ids, ids)
            loss = made(noisy, levels, states, pooled, sizes).float().square().mean()
        torch.autograd.backward(loss)
        optimiser.step()
    return count * steps / (finished(clock, place) - began)


def finished(clock: object, place: torch.device) -> float:
    """The clock's time when the device has done all it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize()
    assert callable(clock)
    return float(clock())


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", default=None)
    asked.add_argument("--steps", type=int, default=4)
    chosen = asked.parse_args()
    place = machine.device(chosen.device)
    machine.settle(place)
    found: dict[str, dict[int, float]] = {}
    for widths in WIDTHS:
        name = " ".join(map(str, widths))
        millions = sum(p.numel() for p in architecture.unet(widths, architecture.WIDER).parameters()) / 1e6
        found[name] = {
            side: round(samples_a_second(widths, side, place, chosen.steps), 1) for side in BATCHES[place.type]
        }
        cells = ", ".join(f"{side}x{side}: {pace}" for side, pace in found[name].items())
        print(f"{name} ({millions:.1f} M): samples a second at {cells}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
