"""What strangers' bytes reach, each as a function of bytes: the targets of ``make fuzz``.

Knows how to call each reader and which errors are its word for "no". Knows no fuzzer. Anything else that is raised is
a finding, and so is memory over the target's cap.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from impasto.errors import ImpastoError

CORPUS = Path(__file__).parent / "corpus"
_SHM = Path("/dev/shm")
_FOLDER = Path(tempfile.mkdtemp(prefix="impasto-fuzz-", dir=_SHM if _SHM.is_dir() else None))
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Target:
    """One reader of strangers' bytes."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    cap: int  # MB of memory that reading any input may take, on top of what the process has after its seeds
    words: tuple[str, ...] = ()  # that mutations are made of


def _quietly(read: Callable[[], object]) -> None:
    with contextlib.suppress(ImpastoError):
        read()


def image(data: bytes) -> None:
    """The image opener, and encoding anew what it gave."""
    from impasto.images import encode_png, mask_of, read_picture

    def read() -> None:
        picture = read_picture(data, "image")
        assert picture.mode in ("RGB", "RGBA")
        if picture.width * picture.height < 250_000:
            encode_png(picture)
            encode_png(mask_of(picture))

    _quietly(read)


def _encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 17)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures() -> Iterator[bytes]:
    yield from (_encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    yield from (_encoded("PNG", mode) for mode in ("RGBA", "P", "L", "LA", "1"))
    yield _encoded("JPEG", "CMYK")
    yield _encoded("WEBP", "RGBA", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield _encoded("JPEG", exif=exif, progressive=True)
    frames = [Image.new("P", (9, 9), i) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    yield buffer.getvalue()


def gate(data: bytes) -> None:
    """The safetensors gate, over a file of these bytes."""
    from impasto.lora.gate import check_header

    path = _FOLDER / "gate.safetensors"
    path.write_bytes(data)
    _quietly(lambda: check_header(path, "loras.0.path"))


def _packed(header: object, size: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(i * 37 % 251 for i in range(size))


def _lora_headers() -> Iterator[dict[str, Any]]:
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    flat = "lora_unet_" + block.replace(".", "_")
    spellings = {
        "kohya": (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"),
        "peft": (f"base_model.model.{block}.lora_A.weight", f"base_model.model.{block}.lora_B.weight"),
        "diffusers": (f"unet.{block}.lora.down.weight", f"unet.{block}.lora.up.weight"),
    }
    for names in spellings.values():
        shapes = ((2, 6), (8, 2), ())
        yield {name: {"dtype": "F32", "shape": list(shape)} for name, shape in zip(names, shapes, strict=False)}
    hada = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}
    lokr = {"lokr_w1": (2, 2), "lokr_w2": (4, 3)}
    oft = {"oft_blocks": (2, 4, 4)}
    boft = {"oft_blocks": (1, 2, 4, 4)}
    dora = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "dora_scale": (8, 1)}
    for parts in (hada, lokr, oft, boft, dora, {"diff": (8, 6)}, {"a1.weight": (2, 6), "b1.weight": (8, 2)}):
        yield {f"{flat}.{part}": {"dtype": "F16", "shape": list(shape)} for part, shape in parts.items()}


def _with_offsets(header: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Give every entry that is one the place its shape needs, so that a mutated header is a whole file."""
    end, placed = 0, {}
    for key, entry in header.items():
        if not isinstance(entry, dict) or key == "__metadata__":
            placed[key] = entry
            continue
        shape = entry.get("shape")
        whole = isinstance(shape, list) and all(type(side) is int and 0 < side < 4096 for side in shape)
        count = math.prod(shape) * _BYTES.get(str(entry.get("dtype")), 4) if whole else 4
        count = min(count, 2**18)
        placed[key] = {**entry, "data_offsets": [end, end + count]}
        end += count
    return placed, min(end, 2**22)


def _gate_seeds() -> Iterator[bytes]:
    for header in _lora_headers():
        yield _packed(*_with_offsets(header))
    yield _packed({}, 0)
    yield _packed({"__metadata__": {"ss_tag_frequency": '{"a": {"b": 1}}', "format": "pt"}}, 0)


def lora(data: bytes) -> None:
    """The LoRA parser, behind the gate; a header that is JSON is given the bytes that it speaks of."""
    from impasto.lora.formats import read_lora
    from impasto.lora.gate import check_header

    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        header = None
    content = _packed(*_with_offsets(header)) if isinstance(header, dict) else data
    path = _FOLDER / "lora.safetensors"
    path.write_bytes(content)

    def read() -> None:
        check_header(path, "loras.0.path")
        read_lora(path, _model(), "loras.0.path")

    _quietly(read)


_MODEL: list[Any] = []


def _model() -> Any:
    from impasto.lora.keys import Target as Place
    from impasto.lora.keys import TargetNames

    if not _MODEL:
        attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
        shapes = {Place("unet", f"{attention}.to_k"): (8, 6), Place("unet", f"{attention}.to_q"): (8, 8)}
        shapes |= {Place("unet", "conv_in"): (8, 4, 3, 3), Place("unet", "conv_in", "bias"): (8,)}
        shapes |= {Place("text_encoder", "encoder.layers.0.mlp.fc1"): (12, 6)}
        _MODEL.append(TargetNames(shapes))
    return _MODEL[0]


def _lora_seeds() -> Iterator[bytes]:
    for header in _lora_headers():
        yield json.dumps(header).encode()
    yield from _gate_seeds()


def uri(data: bytes) -> None:
    """Data URIs and base64, as a start picture and as a mask."""
    from impasto.api.pictures import PictureAt, to_mask_png, to_png

    text = data.decode("utf-8", "surrogateescape")
    _quietly(lambda: PictureAt.of(text, "image"))
    _quietly(lambda: to_png(text, "image"))
    _quietly(lambda: to_mask_png(text, "mask_image"))


def _uri_seeds() -> Iterator[bytes]:
    import base64

    for picture in _pictures():
        coded = base64.b64encode(picture)
        yield b"data:image/png;base64," + coded
        yield coded.rstrip(b"=")
    yield b"data:;charset=x;base64,"
    yield b"http://127.0.0.1/x.png"
    yield b"/outputs/" + b"0" * 32 + b"/1-abc/0.png"


def body(data: bytes) -> None:
    """A request body: JSON, every field of the form, the row it becomes and back."""
    from impasto.api.body import fingerprint, parse_object
    from impasto.api.models import MODELS
    from impasto.api.submission import Submission
    from impasto.types import GenerationRequest

    def read() -> None:
        fields = parse_object(data, "application/json")
        fingerprint("m", fields)
        job = Submission.read(MODELS[len(data) % len(MODELS)], fields).to_job("key")
        row = json.loads(json.dumps(job.input))
        GenerationRequest.from_json(row["request"])

    _quietly(read)


def _body_seeds() -> Iterator[bytes]:
    picture = next(iter(_uri_seeds())).decode()
    yield json.dumps({"prompt": "a red fox"}).encode()
    yield json.dumps(
        {"prompt": "x", "size": "512*512", "loras": [{"path": "a/b", "scale": 0.5}], "seed": -1, "num_images": 4,
         "image": picture, "mask": picture, "strength": 0.5, "scheduler": "K_EULER", "output_format": "jpg",
         "enable_base64_output": True, "guidance_scale": 7.5, "num_inference_steps": 30, "negative_prompt": "y"}
    ).encode()  # fmt: skip
    yield b'{"prompt": NaN}'
    yield b'{"prompt": "\\ud800", "seed": 1e999, "size": "9999999999*1", "loras": {"a": []}}'
    yield b"[" * 5000
    yield b'{"seed": ' + b"9" * 5000 + b"}"


TARGETS = {
    # 50 million pixels: three or four bytes for each, twice while it is turned or flattened, and the file.
    "image": Target(image, _pictures, 700, ("IHDR", "IDAT", "PLTE", "tRNS", "RIFF", "WEBPVP8X", "GIF89a", "Exif")),
    "gate": Target(gate, _gate_seeds, 64, ("data_offsets", "shape", "dtype", "F16", "__metadata__", "lora_up.weight")),
    "lora": Target(
        lora, _lora_seeds, 128,
        ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_t2",
         "oft_blocks", "diff", "diff_b", "lora_mid.weight", "lora_te1_", "BF16", "I64", "shape", "rescale", "on_input"),
    ),
    "uri": Target(uri, _uri_seeds, 700, ("data:", ";base64,", "image/webp", "http://", "/outputs/", "/uploads/")),
    "body": Target(
        body, _body_seeds, 128,
        ("prompt", "loras", "path", "scale", "size", "seed", "null", "true", "image", "mask_image", "-1", "1e400"),
    ),
}  # fmt: skip


def inputs(name: str) -> Iterator[bytes]:
    """The seeds of a target, and what earlier fuzzing found worth keeping."""
    yield from TARGETS[name].seeds()
    for file in sorted((CORPUS / name).glob("*")):
        yield file.read_bytes()
