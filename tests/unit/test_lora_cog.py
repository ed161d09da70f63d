"""cog-sdxl's archives are read where they lie: the LoRA, its words and their vectors; whatever else is in one, not."""

import io
import json
import random
import struct
import tarfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from impasto.config import Settings
from impasto.errors import LoraError
from impasto.lora.cog import MAX_ENTRIES, MAX_NOTES
from impasto.lora.contents import LoraContents
from impasto.lora.formats import read_lora
from impasto.lora.gate import GateLimits, check_header
from impasto.lora.keys import Target, TargetNames
from impasto.lora.report import LoraReport
from impasto.lora.source import open_tensors
from impasto.worker.loras import LoraFiles, LoraLibrary

WIDTHS = (6, 10)
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
MODEL = TargetNames(
    {
        Target("unet", f"{ATTENTION}.to_k"): (8, 6),
        Target("unet", f"{ATTENTION}.to_out.0"): (8, 8),
        Target("text_encoder", "encoder.layers.0.mlp.fc1"): (12, WIDTHS[0]),
        Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): (20, WIDTHS[1]),
    }
)


def numbers(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LORA = {  # as unet.attn_processors' state dict names them
    f"{ATTENTION}.processor.to_k_lora.down.weight": numbers(2, 6),
    f"{ATTENTION}.processor.to_k_lora.up.weight": numbers(8, 2),
    f"{ATTENTION}.processor.to_out_lora.down.weight": numbers(2, 8),
    f"{ATTENTION}.processor.to_out_lora.up.weight": numbers(8, 2, seed=1),
}
TABLES = {f"text_encoders_{i}": numbers(3, width, seed=2 + i) for i, width in enumerate(WIDTHS)}
WORDS = {"TOK": "<s0><s1>", "BAR": "<s2>"}
PARTS = {
    "lora.safetensors": save(LORA),
    "embeddings.pti": save(TABLES),
    "special_params.json": json.dumps(WORDS).encode(),
}


def packed(parts=PARTS, form=tarfile.PAX_FORMAT, extra=()) -> bytes:
    """Pack as cog-sdxl does, with times that are no whole numbers, for which pax has descriptions of its own."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.25
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name="other", kind=tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def read(folder, data: bytes, name="trained_model.tar") -> LoraContents:
    (folder / name).write_bytes(data)
    return read_lora(folder / name, MODEL, "loras.0.path")


def refusal(folder, data: bytes) -> str:
    with pytest.raises(LoraError) as caught:
        read(folder, data)
    return caught.value.problem


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("before", ["", "./"])
def test_an_archive_is_its_lora_with_its_words(tmp_path, form, before):
    """The same patches as the LoRA unpacked; TOK is its rows, and so is each token; folders are passed over."""
    parts = {f"{before}{name}": data for name, data in PARTS.items()} | {"training_args.json": b"{}"}
    contents = read(tmp_path, packed(parts, form, [member("checkpoints", tarfile.DIRTYPE)]))
    save_file(LORA, tmp_path / "lora.safetensors")
    alone = read_lora(tmp_path / "lora.safetensors", MODEL)

    assert contents.patches.keys() == alone.patches.keys()
    assert len(contents.patches) == 2
    for target, patch in contents.patches.items():
        zeros = torch.zeros(MODEL.shape(target))
        assert torch.equal(patch.patched(zeros, 1.0), alone.patches[target].patched(zeros, 1.0))
    meant = {bundle.word: bundle.vectors for bundle in contents.bundles}
    rows = {"TOK": [0, 1], "BAR": [2], "<s0>": [0], "<s1>": [1], "<s2>": [2]}
    assert meant.keys() == rows.keys()
    for word, wanted in rows.items():
        assert all(torch.equal(ours, table[wanted]) for ours, table in zip(meant[word], TABLES.values(), strict=True))
    report = LoraReport.of(contents, "a")
    assert report.warnings == ()
    assert set(report.embeddings) == rows.keys()
    assert contents.ignored == contents.unmatched == ()


def test_what_was_read_stays_when_the_archive_is_written_over(tmp_path):
    """Nothing read is the file's own pages."""
    contents = read(tmp_path, packed())
    before = [bundle.vectors[0].clone() for bundle in contents.bundles]
    path = tmp_path / "trained_model.tar"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(a, bundle.vectors[0]) for a, bundle in zip(before, contents.bundles, strict=True))


def test_a_lora_without_words_is_enough(tmp_path):
    """An archive of ``lora.safetensors`` alone, or of no word list, is a LoRA without words."""
    for left_out in (("embeddings.pti", "special_params.json"), ("special_params.json",)):
        contents = read(tmp_path, packed({name: data for name, data in PARTS.items() if name not in left_out}))
        assert len(contents.patches) == 2
        assert contents.bundles == ()


def test_vectors_that_cannot_be_used_are_told(tmp_path):
    """A pivot for other encoders, or numbers that are not finite, leave the LoRA as good as it is."""
    for tables, reason in (
        ({name: numbers(3, 5) for name in TABLES}, "not for this model"),
        ({**TABLES, "text_encoders_0": torch.full((3, 6), torch.nan)}, "not finite"),
    ):
        contents = read(tmp_path, packed(PARTS | {"embeddings.pti": save(tables)}))
        assert len(contents.patches) == 2
        [warning] = LoraReport.of(contents, "a").warnings
        assert reason in warning


def without(name: str) -> dict[str, bytes]:
    return {other: data for other, data in PARTS.items() if other != name}


def words(meanings) -> bytes:
    return packed(PARTS | {"special_params.json": json.dumps(meanings).encode()})


def sized(size: bytes) -> bytes:
    """An archive whose first entry has these 12 bytes for its size, with the right sum."""
    data = bytearray(packed(form=tarfile.USTAR_FORMAT))
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


HOSTILE = {
    "no LoRA": (packed(without("lora.safetensors")), "it has no lora.safetensors in it"),
    "a whole model": (packed(without("lora.safetensors") | {"unet.safetensors": b"x"}), "a whole model"),
    "a symbolic link": (packed(extra=[member("lora.safetensors", tarfile.SYMTYPE, linkname="/etc/passwd")]), "no file"),
    "a hard link": (packed(extra=[member("x", tarfile.LNKTYPE, linkname="lora.safetensors")]), "no file"),
    "a device": (packed(extra=[member("x", tarfile.CHRTYPE)]), "no file"),
    "a pipe": (packed(extra=[member("x", tarfile.FIFOTYPE)]), "no file"),
    "a very long name": (packed(extra=[member("x" * 300, size=1)], form=tarfile.GNU_FORMAT), "no file"),
    "a name in a description": (packed(extra=[member("x" * 300, size=1)]), "not plain"),
    "a size in a description": (packed(extra=[member(pax_headers={"size": "1"})]), "not plain"),
    "a sparse file": (packed(extra=[member(pax_headers={"GNU.sparse.major": "1"})]), "not plain"),
    "a long description": (packed(extra=[member(pax_headers={"comment": "x" * MAX_NOTES})]), "not plain"),
    "two of a name": (packed(extra=[member("lora.safetensors", size=3)]), "two files of the name"),
    "very many entries": (packed(extra=[member(f"{i}") for i in range(MAX_ENTRIES)]), "more than 256 entries"),
    "a size beyond the file": (sized(b"77777777777\0"), "cut short"),
    "a size in base 256": (sized(b"\x80" + b"\0" * 10 + b"\x01"), "it is broken"),
    "a size below zero": (sized(b"-0000000001\0"), "it is broken"),
    "a wrong sum": (packed()[:100] + b"x" + packed()[101:], "it is broken"),
    "a pickle for vectors": (packed(PARTS | {"embeddings.pti": b"\x80\x02}q\0."}), "embeddings.pti is a pickle"),
    "a pickle for a LoRA": (packed(PARTS | {"lora.safetensors": b"\x80\x02}q\0."}), "is a pickle"),
    "a broken LoRA": (packed(PARTS | {"lora.safetensors": PARTS["lora.safetensors"][:-3]}), "is cut short"),
    "another archive's tables": (packed(PARTS | {"embeddings.pti": save({"x": numbers(1, 1)})}), "not the vectors"),
    "tables of one axis": (
        packed(PARTS | {"embeddings.pti": save({n: numbers(9) for n in TABLES})}),
        "not the vectors",
    ),
    "a row that is not there": (words({"TOK": "<s3>"}), "has not the vectors of its words"),
    "no words": (words({"TOK": "a photo"}), "special_params.json is not like"),
    "words of a list": (words(["TOK"]), "special_params.json is not like"),
    "a blank word": (words({" ": "<s0>"}), "special_params.json is not like"),
    "a word beyond reason": (words({"x" * 101: "<s0>"}), "special_params.json is not like"),
    "words without end": (words({f"w{i}": "<s0>" for i in range(99)}), "special_params.json is not like"),
    "nested words": (packed(PARTS | {"special_params.json": b"[" * 60_000}), "special_params.json is not like"),
    "a long list of words": (packed(PARTS | {"special_params.json": b" " * 70_000}), "special_params.json is not like"),
    "binary words": (packed(PARTS | {"special_params.json": b"\xff\xfe"}), "special_params.json is not like"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_other_archive_is_refused_for_what_it_is(tmp_path, kind):
    """One sentence, and nothing is written anywhere."""
    data, reason = HOSTILE[kind]
    assert reason in refusal(tmp_path, data)
    assert [path.name for path in tmp_path.iterdir()] == ["trained_model.tar"]


def test_an_archive_cut_anywhere_is_refused(tmp_path):
    """At every block, and a little beside it, up to where its last file ends."""
    data = packed()
    last = data.rindex(b"BAR")
    for end in range(512, last, 256):
        assert refusal(tmp_path, data[:end])


def test_an_archive_with_any_damage_is_read_or_refused(tmp_path):
    """Bytes changed, cut out and doubled at random: an error is always ours, with the field."""
    dice, data, fields = random.Random(7), packed(), []
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 1, 3, 20))):
            place, length = dice.randrange(len(damaged)), dice.choice((1, 1, 4, 512))
            piece = damaged[place : place + length]
            damaged[place : place + length] = dice.choice((dice.randbytes(length), b"", piece * 2, bytes(length)))
        try:
            read(tmp_path, bytes(damaged))
        except LoraError as error:
            fields.append(error.field)
    assert 100 < len(fields) < 400
    assert set(fields) == {"loras.0.path"}


def test_an_archive_that_changes_while_it_is_read_is_an_error_of_ours(tmp_path):
    """What the gate saw is not there any more."""
    path = tmp_path / "a.tar"
    path.write_bytes(packed())
    header = check_header(path, "loras.0.path")
    path.write_bytes(packed(PARTS | {"embeddings.pti": save({"x": numbers(1, 1)}) + b" " * 200}))
    with pytest.raises((OSError, SafetensorError)), open_tensors(path, header) as source:
        source.get_tensor("bundle_emb.TOK.clip_l")


def test_an_archive_beyond_its_bound_is_not_read(tmp_path):
    """It is read whole, so its bound is lower than a file's."""
    path = tmp_path / "a.tar"
    path.write_bytes(packed())
    with pytest.raises(LoraError, match=r"more than 0\.000977 MiB; unpack it"):
        check_header(path, "loras.0.path", GateLimits(archive_bytes=1024))


def test_packed_archives_of_other_kinds_are_still_to_be_unpacked(tmp_path):
    """Compressed ones are not opened."""
    assert "a packed archive; unpack it" in refusal(tmp_path, b"\x1f\x8b\x08" + packed())


def test_an_archive_is_found_in_the_folder_and_taken_from_elsewhere(tmp_path):
    """By its name with ``.tar``; and a download that begins like one is not broken off."""
    library = LoraLibrary.of(Settings(data_dir=tmp_path, model="fake", offline=True))
    file = tmp_path / "loras" / "me" / "fox.tar"
    file.parent.mkdir(parents=True)
    file.write_bytes(packed())

    assert library.find("me/fox.tar", "loras.0.path", None).file == file.resolve()
    assert LoraFiles().begins(packed()[:512])
    LoraFiles().check(file)
    assert not LoraFiles().begins(struct.pack("<Q", 10) + b"x" * 504)
