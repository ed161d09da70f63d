"""One switchboard for devices, number formats and faster ways to run the UNet, each with a plain fallback.

Knows what this machine offers torch, and the UNet as a module. Knows no requests. Everything here keeps LoRAs working:
weights are edited in place, and no switch copies them or compiles their values in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

import torch

from impasto.engine.graphs import Graphed
from impasto.engine.memory import MemoryGauge, free_memory
from impasto.errors import ConfigError
from impasto.models import blocked, native
from impasto.models.fp8 import can_multiply, listen, to_fp8
from impasto.models.fused import attend_by, fuse_projections, keep_prompts, pack_projections
from impasto.models.gated import pack_gates
from impasto.models.innermost import stay_innermost
from impasto.models.packed import can_pack, pack_linears
from impasto.models.residence import Offload
from impasto.models.spread import Spread
from impasto.models.tiling import fits
from impasto.models.traced import Traced

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` takes the first accelerator, else the CPU.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``; ``auto`` is float32 on a CPU (exact) and float16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


Tiling = Literal["auto", "on", "off"]
BACKEND: Final = "inductor"  # torch's compiler
COMPILED_SHAPES: Final = 64  # of one network; torch stops at 8 by default and runs further ones uncompiled
NARROW: Final = 256  # channels: measured at 128 (rows) and at 1,280 (operations)
ROOM: Final = 2  # times the packed weights must be free before they are made: as much is left for all else
_ATTENTION: Final = ("blocked_attention", "native_attention")
_CPU_WAYS: Final = (*_ATTENTION, "keep_prompts", "prepack")
_CHOICES = {"offload": get_args(Offload), "vae_tiling": get_args(Tiling)}


@dataclass(frozen=True, slots=True)
class Accel:
    """Switches that change speed and memory; all but ``fp8`` keep the picture, but for rounding. The default: plain.

    Attributes:
        compile: Compile the UNet's transformer blocks; the first call of a kind takes a minute or so.
        channels_last: Keep convolution weights and pictures with the channels innermost.
        fuse_projections: One matmul for q, k, v in each attention.
        cuda_graphs: Replay recorded UNet calls.
        static_shapes: Compile UNet and VAE decoder whole, anew for each picture and batch size.
        vae_channels_last: Keep the VAE's weights with the channels innermost.
        blocked_attention: On a CPU in bfloat16, attend in blocks that stay in the cache; implies fuse_projections.
        native_attention: On a CPU with AVX-512 for bfloat16, attend by a kernel that a C++ compiler makes here in two
            seconds; implies fuse_projections.
        keep_prompts: On a CPU, keep what cross-attention makes of prompts between steps; implies fuse_projections.
        prepack: On a CPU, keep linear weights packed as well, as the matrix product reads them; implies
            fuse_projections.
        decode_beside: Decode pictures on a thread of its own while others step; not with offload.
        spread_rows: On a CPU, divide the rows of a call among the threads, in place of each operation.
        torchscript: On a CPU, run the UNet as TorchScript, traced anew for each picture and batch size, so that threads
            do not wait for Python; not with keep_prompts, prepack or offload=all.
        fp8: Multiply in the UNet's large linear layers in 8 bits, with low-rank LoRAs in full beside: an approximation.
            Not with fuse_projections, nor with what implies it.
        auto: Whichever of these were measured to be faster on this kind of device; never fp8.
        offload: Keep the text encoders, or every network, on the CPU while not in use.
        vae_tiling: Decode in tiles: always, never, or when a whole picture would not fit.

    Raises:
        ConfigError: ``offload`` or ``vae_tiling`` has an unknown value.
    """

    compile: bool = False
    channels_last: bool = False
    fuse_projections: bool = False
    cuda_graphs: bool = False
    static_shapes: bool = False
    vae_channels_last: bool = False
    blocked_attention: bool = False
    native_attention: bool = False
    keep_prompts: bool = False
    prepack: bool = False
    decode_beside: bool = False
    spread_rows: bool = False
    torchscript: bool = False
    fp8: bool = False
    auto: bool = False
    offload: Offload = "none"
    vae_tiling: Tiling = "auto"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"accel: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def parse(cls, text: str) -> Accel:
        """Read a comma list such as ``compile,channels_last,offload=encoders``; empty is the plain way.

        Raises:
            ConfigError: An unknown name or value, or a name given twice.
        """
        found: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, has_value, value = (part.strip() for part in item.partition("="))
            if name in found:
                raise ConfigError(f"accel: {name} is given twice; give it once")
            if name not in {field.name for field in fields(cls)} or (name in _CHOICES) != bool(has_value):
                raise ConfigError(f"accel: unknown item {item[:40]!r}; use {', '.join(_spellings())}")
            found[name] = value if has_value else True
        return cls(**found)


def _spellings() -> list[str]:
    """How each switch is written in a comma list."""
    return [f"{f.name}={'|'.join(_CHOICES[f.name])}" if f.name in _CHOICES else f.name for f in fields(Accel)]


def accelerate_model(model: Any, accel: Accel) -> None:
    """Set all UNets and the VAE of an ``Sdxl`` up as ``accel`` says, in place, after they were loaded."""
    for denoiser in filter(None, (model.base, model.refiner)):
        accelerate_denoiser(denoiser, accel)
    accelerate_vae(model.vae.network, accel, model.devices.vae)


def accelerate_denoiser(denoiser: Any, accel: Accel) -> None:
    """Set a ``Denoiser`` up as ``accel`` says, in place: its UNet, and how it calls it."""
    unet, device = denoiser.unet, denoiser.device
    accel = _ways(unet, accel, device)
    accelerate(unet, accel, device)
    denoiser.spread = spread_rows(unet, accel, device)
    denoiser.traced = trace_calls(unet, accel, device)


def accelerate(unet: Any, accel: Accel, device: torch.device) -> None:
    """Set a UNet up as ``accel`` says, in place, after it was moved to ``device``.

    What cannot be had here is logged and left out. Offloading and VAE tiling are not the UNet's and not done here.
    """
    accel = _ways(unet, accel, device)
    if accel.channels_last:
        stay_innermost(unet)
    rounded = to_fp8(unet) if accel.fp8 and can_multiply(device, unet.dtype) else []
    if rounded:
        accel = _apart(accel)
    on_cpu = _cpu_ways(accel, device)
    if accel.fuse_projections or on_cpu:
        attentions = fuse_projections(unet)
        if "native_attention" in on_cpu and native.kernel() is not None:
            attend_by(attentions, native.attend_compiled if accel.static_shapes else native.attend)
        elif "blocked_attention" in on_cpu:
            attend_by(attentions, blocked.attend_compiled if accel.static_shapes else blocked.attend)
        if "keep_prompts" in on_cpu:
            keep_prompts(unet, attentions)
        if "prepack" in on_cpu and _can_pack(unet, device):
            pack_projections(attentions)
            pack_gates(unet)
            pack_linears(unet)
    if accel.static_shapes and _can_compile(device):
        compile_whole(unet)
    elif accel.compile and _can_compile(device):
        compile_unet(unet)
    if accel.cuda_graphs and _can_record(accel, device):
        unet.forward = Graphed(unet.forward)
        listen(rounded, unet.forward.forget)


def accelerate_vae(vae: Any, accel: Accel, device: torch.device) -> None:
    """Set a VAE up as ``accel`` says, in place."""
    accel = suited(accel, device, vae.dtype) if accel.auto else accel
    if accel.vae_channels_last:
        vae.to(memory_format=torch.channels_last)
    if accel.static_shapes and _can_compile(device):
        compile_whole(vae.decoder)


def spread_rows(unet: Any, accel: Accel, device: torch.device) -> Spread | None:
    """Return what divides calls by rows, where that is on and the device is a CPU with several threads.

    ``auto`` takes it for narrow networks, whose operations are too short to be divided well; wide ones lose by smaller
    products more than they gain.
    """
    accel, threads = _ways(unet, accel, device), torch.get_num_threads()
    if not accel.spread_rows or threads == 1:
        return None
    if device.type != "cpu" or accel.compile or accel.static_shapes:
        log.warning("spread_rows is off: it is for networks on a CPU that are not compiled")
        return None
    return Spread(threads)


def trace_calls(unet: Any, accel: Accel, device: torch.device) -> Traced | None:
    """Return what runs calls as TorchScript, where that is on and the device is a CPU.

    ``auto`` takes it for narrow networks, whose threads spend a quarter of the time on Python's lock.
    """
    accel = _ways(unet, accel, device)
    if not accel.torchscript:
        return None
    if not _can_trace(accel, device):
        log.warning("torchscript is off: it is for networks that stay on a CPU and are not compiled")
        return None
    return Traced([*unet.parameters(), *unet.buffers()])


def _can_trace(accel: Accel, device: torch.device) -> bool:
    return device.type == "cpu" and not (accel.compile or accel.static_shapes) and accel.offload != "all"


def _ways(unet: Any, accel: Accel, device: torch.device) -> Accel:
    """Return the switches one by one, as ``auto`` has them for this UNet."""
    if not accel.auto:
        return accel
    narrow = max(unet.config.block_out_channels) <= NARROW  # its operations are too short to be divided among threads
    return replace(suited(accel, device, unet.dtype, narrow=narrow), auto=False)


def decodes_beside(accel: Accel) -> bool:
    """Whether pictures are decoded beside the steps: where that is on and no network has to make room for another."""
    if accel.decode_beside and accel.offload != "none":
        log.warning("decode_beside is off: with offload=%s networks come and go one at a time", accel.offload)
        return False
    return accel.decode_beside


def suited(accel: Accel, device: torch.device, dtype: torch.dtype, *, narrow: bool = False) -> Accel:
    """Return ``accel`` with the switches on that were measured to pay on such a device (``benchmarks/LOG.md``).

    They need no warm-up: compiling and CUDA graphs are left to those who ask for them. ``narrow`` is for networks whose
    rows are spread and whose calls are traced.
    """
    if device.type == "cpu":
        eager = not (accel.compile or accel.static_shapes)
        traced = (narrow or accel.torchscript) and _can_trace(accel, device)
        keeps = eager and not traced
        packs = keeps and can_pack(device, dtype)
        blocks = dtype == torch.bfloat16 and (eager or accel.static_shapes)
        kernel = blocks and native.can_multiply()
        ways = replace(accel, keep_prompts=keeps, prepack=packs, blocked_attention=blocks, native_attention=kernel)
        spread = accel.spread_rows or (narrow and eager)
        return replace(ways, channels_last=True, vae_channels_last=True, spread_rows=spread, torchscript=traced)
    if device.type == "cuda":
        return replace(accel, channels_last=True, vae_channels_last=True, fuse_projections=True)
    return accel


def _apart(accel: Accel) -> Accel:
    """Switch off what fuses queries, keys and values: in 8 bits they are multiplied one by one."""
    fusing = ("fuse_projections", *_CPU_WAYS)
    if asked := [name for name in fusing if getattr(accel, name)]:
        log.warning("%s: off, fp8 multiplies queries, keys and values apart", ", ".join(asked))
    off: dict[str, Any] = dict.fromkeys(fusing, False)
    return replace(accel, **off)


def _cpu_ways(accel: Accel, device: torch.device) -> set[str]:
    """The switches for CPUs that are on and can be had here."""
    asked = {name for name in _CPU_WAYS if getattr(accel, name)}
    if not asked:
        return set()
    why = "the network is compiled"
    if device.type != "cpu":
        can, why = set(), f"the device is {device}, not cpu"
    elif accel.static_shapes:
        can = asked.intersection(_ATTENTION)
    elif accel.torchscript and _can_trace(accel, device):
        can, why = asked.intersection(_ATTENTION), "the network is traced"
    else:
        can = set() if accel.compile else asked
    if left := asked - can:
        log.warning("%s: off, %s", ", ".join(sorted(left)), why)
    return can


def _can_pack(unet: Any, device: torch.device) -> bool:
    """Whether weights can be packed here, and memory is free for it; what was not packed is multiplied as it is."""
    if not can_pack(device, unet.dtype):
        log.warning("prepack is off: there is no product with packed weights in %s here", unet.dtype)
        return False
    layers = (module for module in unet.modules() if isinstance(module, torch.nn.Linear))
    wanted, free = sum(layer.weight.nbytes for layer in layers), free_memory()
    if free is not None and free < ROOM * wanted:
        log.warning("prepack is off: %d MiB are free, %d are wanted", free >> 20, ROOM * wanted >> 20)
        return False
    return True


def compile_whole(network: Any) -> None:
    """Compile a network's forward as one graph, anew for each shape: fuses across blocks, norms and convolutions too.

    Weights are inputs of the graph, so LoRAs go on and off in place as ever. The first call of a shape takes minutes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    network.forward = torch.compile(network.forward, dynamic=False, backend=BACKEND)


def compile_unet(unet: Any) -> None:
    """Compile each transformer block, for any batch and picture size.

    Blocks of one width share their code. Shapes are dynamic from the start, so SDXL's two widths need two graphs
    each (one row, several rows), far below torch's limit of 8. Weights are inputs of the graphs: editing them in
    place changes nothing that is compiled.
    """
    unet.compile_repeated_blocks(dynamic=True)


def _can_compile(device: torch.device) -> bool:
    """Try the compiler on a trifle: it needs a C++ compiler on a CPU, Triton on a GPU."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        log.warning("compile is off: nothing can be compiled for %s (%s)", device, str(error).splitlines()[0])
        return False
    return True


def _can_record(accel: Accel, device: torch.device) -> bool:
    if device.type != "cuda":
        log.warning("cuda_graphs is off: the device is %s, not cuda", device)
        return False
    if accel.offload == "all":
        log.warning("cuda_graphs is off: offload=all moves the weights that a graph expects in place")
        return False
    return True


def in_tiles(when: Tiling, gauge: MemoryGauge, pixels: int, dtype: torch.dtype) -> bool:
    """Whether the VAE does a picture of so many pixels in tiles: by order, or where it would not fit whole."""
    if when == "auto":
        free = gauge.free()
        return free is not None and not fits(pixels, dtype, free)
    return when == "on"
