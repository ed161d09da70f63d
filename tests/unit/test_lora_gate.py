"""The gate: a hostile or mistaken file is refused from its header, quickly, in little memory, in words that help."""

import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.errors import LoraError
from impasto.lora.gate import GateLimits, Header, check_header
from impasto.lora.notes import trigger_words
from impasto.tensorfile import TensorInfo

FIELD = "loras.0.path"
NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
SECONDS = 0.5
BYTES = 64 * 2**20  # a header at its limit of 2 MiB, parsed into Python's objects, with room; a tensor may take GiBs


def entry(shape, begin=0, dtype="F32", end=None):
    """One tensor of the header, with the bytes its shape needs."""
    sizes = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "BOOL": 1}
    count = sizes.get(dtype, 4)
    for side in shape:
        count *= side
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + count if end is None else end]}


def packed(header, data=b"", length=None):
    """A file: 8 bytes of length, the header, the data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def pair(down=(4, 64), up=(64, 4), dtype="F32", names=(DOWN, UP), **more):
    """A whole file with one low-rank pair, and its data."""
    first = entry(down, 0, dtype)
    second = entry(up, first["data_offsets"][1], dtype)
    return packed({names[0]: first, names[1]: second} | more, b"\0" * second["data_offsets"][1])


def one(key, tensor, size=None):
    """A whole file with one tensor."""
    return packed({key: tensor}, b"\0" * (tensor["data_offsets"][1] if size is None else size))


def zipped(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr(name, b"x" * 100)
    return (tmp_path / "made.zip").read_bytes()


def saved_by_torch(tmp_path, **options):
    torch.save({"weight": torch.zeros(4)}, tmp_path / "made.pt", **options)
    return (tmp_path / "made.pt").read_bytes()


def many(count, name="lora_unet_module_{}.alpha"):
    return {name.format(i): entry((), 4 * i) for i in range(count)}


NO_TOKEN = "use the file's own download link, with a token if it needs one"
HOSTILE = {
    # Not safetensors at all
    "empty": (b"", "is an empty file; fetch it again"),
    "one byte": (b"\x10", "not a safetensors file"),
    "only a length": (struct.pack("<Q", 100), "not a safetensors file"),
    "login page": (b"<!DOCTYPE html>\n<html><title>Log in</title>", f"an HTML page, such as a login .*{NO_TOKEN}"),
    "page after a blank line": (b"\n\n <HTML><body>403", f"an HTML page.*{NO_TOKEN}"),
    "page after a comment": (b"<!-- a -->\n<html>", "an HTML page"),
    "page after a byte order mark": (b"\xef\xbb\xbf<html>", "an HTML page"),
    "JSON error": (b'{"error":"Invalid username or password."}', f"JSON text, such as an error.*{NO_TOKEN}"),
    "JSON whose ninth byte is a brace": (b'{"data":{"error":"login"}}', "JSON text"),
    "JSON list": (b'["not found"]', "JSON text"),
    "XML error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "plain error": (b"Entry not found", f"plain text, such as an error.*{NO_TOKEN}"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git-LFS pointer.*fetch"),
    "pickle 4": (pickle.dumps({"a": [1.0] * 99}, 4), "a pickle, which could run anything"),
    "pickle 2": (pickle.dumps({"a": 1}, 2), "a pickle"),
    "pickle 0": (b"cposix\nsystem\n(S'true'\ntR.", "a pickle"),
    "torch zip": (lambda at: saved_by_torch(at), "a pickle in a zip"),
    "torch before zip": (lambda at: saved_by_torch(at, _use_new_zipfile_serialization=False), "a pickle"),
    "zip with the LoRA in it": (lambda at: zipped(at, "lora.safetensors"), "a zip archive; unpack it"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 50, "a packed archive; unpack it"),
    "tar": (b"lora.safetensors".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 300, "a packed archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "a picture"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "an HDF5 file"),
    "noise": (b"\xfe\xdc\xba\x98" * 99, "not a safetensors file"),
    # A header that lies about itself
    "header of 100 GB": (packed(b"{}", length=100 * 10**9), "not a safetensors file"),
    "header of 50 MB": (packed(b"{}", length=50_000_000), "has a header of 47.7 MiB, at most 32 MiB"),
    "length of all ones": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "header longer than the file": (packed(b'{"a":', length=5000), "cut short inside its header"),
    "no JSON": (packed(b"{broken!"), "a broken safetensors header"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "a broken safetensors header"),
    "UTF-16": (packed('{"a": 1}'.encode("utf-16-le")), "a broken safetensors header"),
    "deep nesting": (packed(b'{"a":' + b"[" * 500_000), "a broken safetensors header"),
    "a number of a million digits": (packed(b'{"a":' + b"9" * 10**6 + b"}"), "a broken safetensors header"),
    "not a number": (packed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'), "header at 'a'"),
    "entry is no object": (packed({"a": "b"}), "a broken safetensors header at 'a'"),
    "entry is a list": (packed({"a": [1]}), "a broken safetensors header at 'a'"),
    "field missing": (packed({"a": {"dtype": "F32", "shape": [1]}}), "a broken safetensors header at 'a'"),
    "field too many": (packed({"a": entry((1,)) | {"url": "x"}}, b"0000"), "a broken safetensors header at 'a'"),
    "shape of floats": (packed({"a": entry((1,)) | {"shape": [1.0]}}, b"0000"), "a broken safetensors header at 'a'"),
    "shape of truths": (packed({"a": entry((1,)) | {"shape": [True]}}, b"0000"), "a broken safetensors header at 'a'"),
    "negative shape": (packed({"a": entry((1,)) | {"shape": [-1]}}, b"0000"), "a broken safetensors header at 'a'"),
    "three offsets": (packed({"a": entry((1,)) | {"data_offsets": [0, 2, 4]}}), "a broken safetensors header at 'a'"),
    "name twice": (packed(b'{"a": {}, "a": {}}'), "'a' stands in it twice"),
    "metadata not text": (packed({"__metadata__": {"rank": 4}, "a": entry((1,))}, b"0000"), "metadata that are not"),
    "metadata a list": (packed({"__metadata__": ["a"], "a": entry((1,))}, b"0000"), "metadata that are not"),
    "no tensors": (packed({}), "holds no tensors"),
    "metadata alone": (packed({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "60,000 alphas": (lambda at: packed({f"{i:05}": 0 for i in range(60_000)}), "holds 60000 tensors, at most 20000"),
    "header bloat": (lambda at: packed(many(100_000)), "more than 2 MiB of names and short notes"),
    "metadata bloat": (
        lambda at: packed({"__metadata__": {f"{i}": "x" * 2_000_000 for i in range(12)}}),
        "8 MiB of long texts; strip its metadata",
    ),
    "ten million objects": (lambda at: packed(b'{"a":[' + b"{}," * 10_000_000 + b"{}]}"), "more than 2 MiB of names"),
    "a text that never ends": (lambda at: packed(b'{"' + b'\\"' * 3_000_000), "not the JSON that it should be"),
    "nothing but quotes": (lambda at: packed(b"{" + b'"' * 31_000_000), "more than 2 MiB of names"),
    "empty objects": (lambda at: packed(b'{"a":[' + b"{}," * 690_000 + b"{}]}"), "a broken safetensors header at 'a'"),
    # Data that are not there, or there twice
    "cut in its data": (pair()[:-1], "is cut short: 2047 of 2048 bytes"),
    "trailing bytes": (pair() + b"<?php", "has 5 bytes after its last tensor"),
    "out of range": (packed({"a": entry((10**9,))}, b"\0" * 100), "cut short: 100 of 4000000000 bytes"),
    "overlap": (packed({"a": entry((4,)), "b": entry((4,), 8)}, b"\0" * 24), "tensors overlap at byte 8"),
    "alias": (packed({"a": entry((4,)), "b": entry((4,))}, b"\0" * 16), "tensors overlap at byte 0"),
    "hole": (packed({"a": entry((4,)), "b": entry((4,), 32)}, b"\0" * 48), "tensors leave a hole at byte 16"),
    "offsets backwards": (packed({"a": entry((1,)) | {"data_offsets": [4, 0]}}, b"0000"), "not the bytes of its shape"),
    "shape larger than its bytes": (one("a", entry((2**40, 2**40), end=64)), "not the bytes of its shape"),
    "overflowing shape": (one("a", entry((2**32, 2**32), end=0)), "not the bytes of its shape"),
    # Tensors that no trainer writes
    "huge zero-size": (packed({DOWN: entry((3_000_000, 0)), UP: entry((0, 3_000_000))}), "of the empty shape"),
    "rank 0": (packed({DOWN: entry((0, 64)), UP: entry((64, 0))}), r"of the empty shape \[0, 64\]"),
    "a million axes": (one("a", entry((1,) * 300_000)), "with 300000 axes; weights have at most 6"),
    "unknown dtype": (one("a", entry((1,), dtype="F31")), "'F31', a format that is not read"),
    "four-bit floats": (one("a", entry((8,), dtype="F4", end=4)), "'F4', a format that is not read"),
    "complex numbers": (one("a", entry((1,), dtype="C64", end=8)), "'C64', a format that is not read"),
    "NUL in a name": (one("a\0b", entry((1,))), r"the name 'a\\x00b'"),
    "path as a name": (one("../../etc/passwd", entry((1,))), "the name '../../etc/passwd'"),
    "absolute path as a name": (one("/etc/passwd", entry((1,))), "the name '/etc/passwd'"),
    "backslash": (one("a\\b", entry((1,))), "which no trainer writes"),
    "line break in a name": (one("a\nb", entry((1,))), r"the name 'a\\nb'"),
    "right-to-left mark in a name": (one("a\u202eb", entry((1,))), "which no trainer writes"),
    "terminal colours in a name": (one("\x1b[31m", entry((1,))), r"the name '\\x1b"),
    "endless name": (one("a" * 257, entry((1,))), "which no trainer writes"),
    "empty name": (one("", entry((1,))), "which no trainer writes"),
    "half a surrogate": (one("\ud800", entry((1,))), "which no trainer writes"),
    # Low-rank pairs that do not multiply
    "ranks disagree": (pair(down=(8, 64)), "the halves of 'lora_unet_.*' have the ranks 8 and 4"),
    "ranks disagree, PEFT": (pair(down=(8, 64), names=("a.lora_A.weight", "a.lora_B.weight")), "ranks 8 and 4"),
    "ranks disagree, adapter": (pair((8, 64), names=("a.lora_A.x.weight", "a.lora_B.x.weight")), "ranks 8 and 4"),
    "ranks disagree, old": (pair((8, 64), names=("a.to_q_lora.down.weight", "a.to_q_lora.up.weight")), "ranks 8 and 4"),
    "rank past reason": (pair(down=(2048, 64), up=(64, 2048)), "has rank 2048 .*at most 1024"),
    "rank past reason, shared": (
        pair(down=(2048, 64), up=(64, 2048), names=("base_model.vera_A", "base_model.vera_B")), "has rank 2048",
    ),
    "half of one axis": (pair(down=(64,)), r"of shape \[64\], which is no half of a low-rank pair"),
}  # fmt: skip


def made(tmp_path, kind):
    content, phrase = HOSTILE[kind]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content(tmp_path) if callable(content) else content)
    return path, phrase


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence_and_in_little_memory(tmp_path, kind):
    """The sentence names the field and what is wrong; no path of ours is in it; Python's peak memory stays small."""
    path, phrase = made(tmp_path, kind)
    tracemalloc.start()
    try:
        with pytest.raises(LoraError, match=phrase) as caught:
            check_header(path, FIELD)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{FIELD} ")
    assert "\n" not in message and message.isprintable() and len(message) < 400
    assert str(tmp_path) not in message
    assert peak < BYTES


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_refusal_takes_less_than_half_a_second(tmp_path, kind):
    """Of this thread's own time, and the best of three, so that a busy machine counts little."""
    path, _ = made(tmp_path, kind)
    took = []
    for _ in range(3):
        began = time.thread_time()
        with pytest.raises(LoraError):
            check_header(path, FIELD)
        took.append(time.thread_time() - began)
    assert min(took) < SECONDS


def test_there_are_more_than_fifty_hostile_kinds():
    """As promised; and no two of them are the same file."""
    contents = [content for content, _ in HOSTILE.values() if isinstance(content, bytes)]
    assert len(HOSTILE) > 50
    assert len(set(contents)) == len(contents)


GOOD = {
    "kohya": {DOWN: torch.ones(4, 64), UP: torch.ones(64, 4), f"{NAME}.alpha": torch.tensor(4.0)},
    "PEFT": {"unet.a.lora_A.weight": torch.ones(4, 64), "unet.a.lora_B.weight": torch.ones(64, 4)},
    "PEFT bias": {"a.lora_A.weight": torch.ones(4, 8), "a.lora_B.bias": torch.ones(8)},
    "bare PEFT": {"a.lora_A": torch.ones(4, 64), "a.lora_B": torch.ones(64, 4)},
    "old": {"a.to_q_lora.down.weight": torch.ones(4, 64), "a.to_q_lora.up.weight": torch.ones(64, 4)},
    "linear layer": {f"a.lora_linear_layer.{half}.weight": torch.ones(8, 8) for half in ("down", "up")},
    "convolution": {DOWN: torch.ones(4, 64, 3, 3), UP: torch.ones(64, 4, 1, 1)},
    "fp8": {DOWN: torch.ones(4, 64).to(torch.float8_e4m3fn), UP: torch.ones(64, 4).to(torch.float8_e5m2)},
    "mixed": {DOWN: torch.ones(4, 64).bfloat16(), UP: torch.ones(64, 4).half(), f"{NAME}.alpha": torch.tensor([4])},
    "double": {DOWN: torch.ones(4, 64).double(), UP: torch.ones(64, 4).double()},
    "rank 1024": {DOWN: torch.ones(1024, 8), UP: torch.ones(8, 1024)},
    "bundled embedding": {"bundle_emb.<my token> 猫.clip_l": torch.ones(2, 768)},
    "half a pair": {DOWN: torch.ones(4, 64)},
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_an_ordinary_file_passes_with_every_name_dtype_and_shape(tmp_path, kind):
    """The control of all guards: the header says what the reference reader loads."""
    path = tmp_path / "any name at all"
    save_file(GOOD[kind], path, metadata={"ss_network_dim": "4"})
    header = check_header(path, FIELD)
    assert {key: info.shape for key, info in header.tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in load_file(path).items()
    }
    assert header.metadata == {"ss_network_dim": "4"}


def test_the_header_has_the_format_s_words(tmp_path):
    """Dtypes as the file spells them, no metadata where there are none."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pair(dtype="BF16"))
    assert check_header(path, FIELD) == Header({DOWN: TensorInfo("BF16", (4, 64)), UP: TensorInfo("BF16", (64, 4))}, {})


def captions(count):
    """kohya's count of tags, where the pictures' captions are whole sentences."""
    tags = {
        f'picture {i} of a "red" caf\u00e9 \U0001f600 at the sea, with a back\\slash and many words': 1
        for i in range(count)
    }
    return json.dumps({"10_cafe": {"inkwash": count} | tags})


def test_a_header_of_captions_passes_in_little_memory(tmp_path):
    """Trainers note every caption: 20 MB of them are read up to a bound, and what stands behind them whole."""
    path = tmp_path / "lora.safetensors"
    texts = {"ss_tag_frequency": captions(60_000), "ss_datasets": captions(90_000), "lora_adapter_metadata": "{}"}
    path.write_bytes(pair(__metadata__=texts))
    assert path.stat().st_size > 15_000_000
    tracemalloc.start()
    try:
        header = check_header(path, FIELD)
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    assert header.tensors.keys() == {DOWN, UP}
    assert header.metadata["lora_adapter_metadata"] == "{}"
    assert texts["ss_datasets"].startswith(header.metadata["ss_datasets"])
    assert len(header.metadata["ss_datasets"]) > 500_000
    assert trigger_words(header.metadata)[0] == "inkwash"


@pytest.mark.parametrize("before", range(8))
@pytest.mark.parametrize("letter", ["\u00e9", "\U0001f600", '"', "\\", "\x01", "\\\\"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_text_is_never_cut_inside_a_letter(tmp_path, before, letter, ascii_only):
    """Wherever the cut falls, among bytes of UTF-8 or an escape of JSON, what is left is the text's own beginning."""
    text = "x" * before + letter * 700_000
    tensor = json.dumps({"__metadata__": {"a": text}, DOWN: entry((4, 64))}, ensure_ascii=ascii_only).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(packed(tensor, b"\0" * 1024))
    cut = check_header(path, FIELD).metadata["a"]
    assert text.startswith(cut)
    assert len(cut) > 80_000


@pytest.mark.parametrize(
    ("limits", "phrase"),
    [
        (GateLimits(file_bytes=2000), "is larger than 1.86e-06 GiB, so it is no LoRA"),
        (GateLimits(header_bytes=100), "has a header of"),
        (GateLimits(tensors=1), "holds 2 tensors, at most 1 are taken"),
        (GateLimits(rank=3), "has rank 4 .*at most 3"),
    ],
)
def test_every_limit_can_be_set(tmp_path, limits, phrase):
    """A file that passes by default is refused by a smaller limit."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pair())
    check_header(path, FIELD)
    with pytest.raises(LoraError, match=phrase):
        check_header(path, FIELD, limits)


def test_a_file_of_three_gib_is_refused_unread(tmp_path):
    """A sparse one costs the test nothing, and the gate no more."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pair())
    os.truncate(path, 3 * 2**30)
    with pytest.raises(LoraError, match="is larger than 2 GiB, so it is no LoRA"):
        check_header(path, FIELD)


def test_what_is_no_file_is_refused(tmp_path):
    """A folder, a pipe (which would wait for ever), nothing, and a path that cannot be one."""
    os.mkfifo(tmp_path / "pipe")
    for name, phrase in (
        ("", "is not a file"),
        ("pipe", "is not a file"),
        ("gone", "No such file"),
        ("a\0", "not a path"),
    ):
        with pytest.raises(LoraError, match=phrase):
            check_header(tmp_path / name, FIELD)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """At every length but its own."""
    whole = pair()
    path = tmp_path / "lora.safetensors"
    for length in (*range(0, 600, 7), *range(600, len(whole), 101), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LoraError):
            check_header(path, FIELD)


def test_no_word_of_the_file_is_repeated_at_length(tmp_path):
    """A name of ten thousand characters leaves a hundred in the message."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(one("x" * 10_000, entry((1,))))
    with pytest.raises(LoraError) as caught:
        check_header(path, FIELD)
    assert len(re.findall("x", str(caught.value))) <= 110
