"""A UNet run by OpenVINO on the CPU, in a number format of its own choice or ours, its weights compiled in.

Knows OpenVINO. It is how fast a processor can go when nothing has to stay editable: a LoRA would need everything to be
compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.unets import inputs_of, make_unet

FILE: Final = "unet.xml"
PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Positional(nn.Module):
    """The UNet with its inputs in a row, as a traced model has them."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        output: Tensor = self.unet(sample, timesteps, tokens, added_cond_kwargs=added, return_dict=False)[0]
        return output


def write_openvino(model: str, dtype: torch.dtype, side: int, folder: str) -> None:
    """Trace a UNet for pictures of one size and write it as OpenVINO's files.

    In a process of its own: OpenVINO replaces functions of torch for good, and the memory is given back.
    """
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]
    from openvino.frontend.pytorch import patch_model  # type: ignore[import-not-found,unused-ignore]

    unet = make_unet(model, dtype)
    inputs = inputs_of(unet.config, side)
    if dtype != torch.float32:
        getattr(patch_model, "__make_16bit_traceable")(unet)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    with torch.no_grad():
        traced = ov.convert_model(_Positional(unet), example_input=inputs, input=shapes)
    ov.save_model(traced, Path(folder) / FILE, compress_to_fp16=True)


def read_openvino(file: Path, dtype: torch.dtype, threads: int) -> Callable[..., Tensor]:
    """Compile what ``write_openvino`` wrote, and return it as a function of the same inputs."""
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(file, "CPU", options).create_infer_request()

    def call(*inputs: Tensor) -> Tensor:
        outputs = request.infer([tensor.float().numpy() for tensor in inputs])
        return torch.from_numpy(next(iter(outputs.values())))

    return call


def trace_openvino(model: str, dtype: torch.dtype, sides: Sequence[int], folder: Path) -> dict[int, Path]:
    """Trace a model's UNet for each size, and return the files; full-size SDXL needs 15 GB meanwhile."""
    files = {}
    for side in sides:
        place = folder / str(side)
        place.mkdir()
        writer = get_context("spawn").Process(target=write_openvino, args=(model, dtype, side, str(place)))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("OpenVINO could not trace the UNet; see above, or leave it out with --no-openvino")
        files[side] = place / FILE
    return files
