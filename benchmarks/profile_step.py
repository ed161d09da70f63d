"""Where does the time of a step go? ``python -m benchmarks.profile_step``.

The physics: products of matrices and convolutions are bound by arithmetic, norms and activations by memory, and small
kernels by the time it takes to launch them. Which of them a step spends its time in says what is worth changing, and a
change that does not show here was not one. Prints torch's table of the costliest operators for one UNet call (two rows)
and for one VAE decode, for each list of switches, and how much of the wall time the device was busy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import roofline
from benchmarks.options import engine_options
from benchmarks.unets import inputs_of
from benchmarks.ways import Ours
from benchmarks.weights import model_folder
from impasto.engine.accel import choose_device

CALLS = 3


def main() -> None:
    """Profile each list of switches."""
    options = _options()
    folder = model_folder(options.model, options.models)
    for accel in options.accels:
        print(f"\n# {accel or 'plain'}")
        model = Ours(folder, options.device, options.dtype, accel).engine._model
        denoiser, side = model.base, options.side // roofline.CELL
        inputs = tuple(tensor.to(model.device) for tensor in inputs_of(denoiser.unet.config, options.side))
        latents = torch.randn(4, side, side)
        _show("one UNet call", lambda: denoiser.predict(*inputs), options)  # noqa: B023
        _show("one decode", lambda: model.vae.decode(latents), options)  # noqa: B023


@torch.inference_mode()
def _show(name: str, call: Callable[[], object], options: argparse.Namespace) -> None:
    device = str(choose_device(options.device))
    for _ in range(2):
        call()
    start = roofline.now(device)
    for _ in range(CALLS):
        call()
    wall = (roofline.now(device) - start) / CALLS
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=activities) as seen:
        call()
        roofline.now(device)
    averages = seen.key_averages()
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    busy = sum(getattr(event, key) for event in averages) / 1e6
    print(f"{name}: {1000 * wall:.2f} ms, of which operators {1000 * busy:.2f}")
    print(averages.table(sort_by=key, row_limit=options.rows, max_name_column_width=60))


def _options() -> argparse.Namespace:
    asked = engine_options(__doc__)
    asked.add_argument("--accels", nargs="+", default=["", "auto"])
    asked.add_argument("--side", type=int, default=512, help="pixels")
    asked.add_argument("--rows", type=int, default=15, help="of the table")
    return asked.parse_args()


if __name__ == "__main__":
    main()
