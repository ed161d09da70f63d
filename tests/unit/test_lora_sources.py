"""What users write for a LoRA, and the file it leads to: names, the hub, Civitai and web addresses, over loopback."""

import hashlib
import json
import logging
import struct
from pathlib import Path

import pytest

from impasto.config import Settings
from impasto.errors import ConfigError, LoraError
from impasto.fetch.reference import CivitaiFile, HubFile, WebFile, parse_reference
from impasto.worker.loras import LoraLibrary, make_sites, policy_of
from tests.hub_server import Repository, running_hub
from tests.sites import CivitaiSite, Page, Web, redirect, running
from tests.unit.test_lora_cog import packed

FIELD = "loras.1.path"


def lora(mark=1):
    """A safetensors file that the gate lets through; ``mark`` makes it another one."""
    header = json.dumps({"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}})
    return struct.pack("<Q", len(header)) + header.encode() + struct.pack("<4f", *[mark] * 4)


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def civitai():
    with running(CivitaiSite()) as server, running(Web()) as store:
        server.store = store
        yield server


@pytest.fixture
def web():
    with running(Web()) as server:
        yield server


@pytest.fixture
def library(tmp_path, hub, civitai, web):
    """A library whose sites are the servers above; ``settings`` may add to it."""

    def build(**settings):
        ports = [hub.server_port, web.server_port, civitai.store.server_port]
        reach = {"fetch_allow": ["127.0.0.1", "localhost"], "fetch_http": True, "fetch_ports": ports}
        ends = {"hf_endpoint": hub.url, "civitai_endpoint": civitai.url}
        return LoraLibrary.of(Settings(data_dir=tmp_path, **{"model": "fake", **reach, **ends, **settings}))

    return build


def find(library, name, key_id="k1"):
    return library.find(name, FIELD, key_id)


def content(library, name):
    return find(library, name).file.read_bytes()


def refusal(library, name):
    with pytest.raises(LoraError) as error:
        find(library, name)
    assert error.value.field == FIELD
    assert str(error.value).startswith(f"{FIELD} {name[:200]!r} "), error.value
    return error.value.problem


def put(folder, name, data=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or lora())
    return path


# Names on this machine


def test_a_name_is_a_file_in_the_operators_folder(tmp_path, library):
    """In subfolders and with dots, with or without the ending; the answer says where it came from."""
    for name in ("plain", "me/style", "deep/er/v1.5 (final)"):
        file = put(tmp_path / "loras", f"{name}.safetensors")
        for written in (name, f"{name}.safetensors", f" {name} "):
            found = find(library(), written)
            assert (found.file, found.source, found.alias_of) == (file, f"folder:{name}.safetensors", None)


@pytest.mark.parametrize(
    "name",
    ["../outside", "a/../../outside", "/etc/passwd", "{tmp}/outside", "..", ".", "", "*", "a\x00b", "a\\..\\outside",
     "link", "linked/inner", "plain/", "//plain", "x" * 5000, "~/outside", "file:///{tmp}/outside.safetensors"],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(tmp_path, library, name):
    """Dots, roots, links and control characters; with a file out there that could be found."""
    put(tmp_path, "outside.safetensors")
    put(tmp_path, "other/inner.safetensors")
    put(tmp_path / "loras", "plain.safetensors")
    (tmp_path / "loras" / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (tmp_path / "loras" / "linked").symlink_to(tmp_path / "other")
    assert "loras folder" in refusal(library(offline=True), name.replace("{tmp}", str(tmp_path)))


def test_links_inside_the_folder_are_followed(tmp_path, library):
    """Two names for one file."""
    file = put(tmp_path / "loras", "a.safetensors")
    (tmp_path / "loras" / "b.safetensors").symlink_to("a.safetensors")
    assert find(library(), "b").file == file


def test_an_alias_stands_for_whatever_can_be_named(tmp_path, library, hub, civitai):
    """Some clients can only send ``user/name``: the operator's table comes first, and the answer says so."""
    file = put(tmp_path / "loras", "flat.safetensors")
    hub.repositories["o/n"] = Repository({"x.safetensors": lora(7)})
    civitai.add(1, 2, lora(8))
    built = library(lora_aliases={"me/style": "flat", "hub": "o/n", "c/c": "civitai:1@2", "a": "b", "b": "flat"})
    found = find(built, "me/style")
    assert (found.file, found.alias_of) == (file, "flat")
    assert (content(built, "hub"), content(built, "c/c")) == (lora(7), lora(8))
    assert find(built, "https://huggingface.co/me/style").file == file, "the repository's page is the same name"
    assert "was not found" in refusal(built, "a"), "an alias of an alias is not followed"


def test_the_documented_lora_is_a_shipped_one_for_the_built_in_model(tmp_path, library, monkeypatch):
    """In every spelling of the repository; for another model the repository itself is meant."""
    shipped = put(tmp_path / "shipped", "pixel_art.safetensors")
    monkeypatch.setattr("impasto.worker.loras.SHIPPED", tmp_path / "shipped")
    built = library(model="builtin", offline=True)
    for name in (
        "nerijs/pixel-art-xl", "nerijs/pixel-art-xl/pixel-art-xl.safetensors", "https://huggingface.co/nerijs/pixel-art-xl",
    ):  # fmt: skip
        found = find(built, name)
        assert (found.file, found.source, found.alias_of) == (shipped, "shipped:pixel_art", "pixel_art")
    for name in ("pixel-art", "Pixel Art", "builtin/pixel-art", "pixel_art.safetensors"):
        found = find(built, name)
        assert (found.file, found.alias_of) == (shipped, None)
    assert "was not found" in refusal(library(model="fake", offline=True), "nerijs/pixel-art-xl")


def test_an_uploaded_lora_is_found_by_its_own_key_alone(tmp_path):
    """Another key's name for it means nothing."""
    file = put(tmp_path, "up.safetensors")
    library = LoraLibrary(tmp_path, uploads=lambda key, name: file if (key, name) == ("k1", "mine") else None)
    found = find(library, "mine")
    assert (found.file, found.source) == (file, "upload:mine")
    with pytest.raises(LoraError):
        find(library, "mine", "k2")


# Spellings


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("o/n", HubFile("o/n")),
        ("o/n/", HubFile("o/n")),
        ("hf:o/n@v1", HubFile("o/n", None, "v1")),
        ("o/n/a b/c-(1).safetensors@refs/pr/3", HubFile("o/n", "a b/c-(1).safetensors", "refs/pr/3")),
        ("https://huggingface.co/o/n", HubFile("o/n")),
        ("https://hf.co/o/n/tree/main", HubFile("o/n", None, "main")),
        ("https://huggingface.co/o/n/blob/main/a%20b.safetensors", HubFile("o/n", "a b.safetensors", "main")),
        ("https://huggingface.co/o/n/resolve/refs%2Fpr%2F1/d/x.safetensors?download=true",
         HubFile("o/n", "d/x.safetensors", "refs/pr/1")),
        ("https://huggingface.co/datasets/o/n/resolve/main/x.safetensors",
         WebFile("https://huggingface.co/datasets/o/n/resolve/main/x.safetensors")),
        ("https://huggingface.co/o/n/resolve/main/../../x", WebFile("https://huggingface.co/o/n/resolve/main/../../x")),
        ("https://civitai.com/models/12/some-name?modelVersionId=34", CivitaiFile("12", "34")),
        ("https://civitai.com/models/12", CivitaiFile("12")),
        ("https://www.civitai.com/models/12/x?modelVersionId=..", CivitaiFile("12")),
        ("https://civitai.com/api/download/models/34?type=Model&format=SafeTensor", CivitaiFile(None, "34")),
        ("https://civitai.com/api/v1/model-versions/34", CivitaiFile(None, "34")),
        ("civitai:12@34", CivitaiFile("12", "34")),
        ("civitai:12", CivitaiFile("12")),
        ("12@34", CivitaiFile("12", "34")),
        ("urn:air:sdxl:lora:civitai:12@34", CivitaiFile("12", "34", "sdxl", "lora")),
        ("URN:AIR:SDXL:LORA:civitai:12", CivitaiFile("12", None, "sdxl", "lora")),
        ("air:sdxl:lora:civitai:12@34:model.safetensors", CivitaiFile("12", "34", "sdxl", "lora")),
        ("urn:air:sdxl:lora:huggingface:o/n@v1", HubFile("o/n", None, "v1")),
        ("https://example.com/models/12", WebFile("https://example.com/models/12")),
        ("https://civitai.com.example/models/12", WebFile("https://civitai.com.example/models/12")),
        ("HTTPS://EXAMPLE.com/x.safetensors", WebFile("HTTPS://EXAMPLE.com/x.safetensors")),
        ("plain", None), ("../x", None), ("o/..", None), ("o/n/../x.safetensors", None), ("o/.n", None),
        ("o/n/a\nb.safetensors", None), ("o/n@../x", None), ("/o/n", None), ("ftp://x/y", None), ("", None),
        ("urn:air:sdxl:lora:civitai:x@y", None), ("o" * 100 + "/n", None), ("ö/n", None),
    ],
)  # fmt: skip
def test_every_spelling_is_read(text, reference):
    """As pages, clients and people write it; what is none of them is nothing."""
    assert parse_reference(text) == reference


# The hub


def test_a_repository_brings_its_lora_through_the_store_of_large_files(library, hub):
    """By the commit that the hub names; a second request asks nobody."""
    hub.repositories["o/n"] = repository = Repository({"README.md": b"hi", "any.safetensors": lora()})
    built = library()
    found = find(built, "o/n")
    assert found.file.read_bytes() == lora()
    assert found.source == f"hub:o/n/any.safetensors@{repository.commit[:12]}"
    before = list(hub.asked)
    assert f"GET /o/n/resolve/{repository.commit}/any.safetensors" in before
    assert find(built, "o/n").file == found.file
    assert hub.asked == before


def test_which_file_is_meant(library, hub):
    """The only one; diffusers' usual name; the repository's own name; else the error lists them."""
    usual = "pytorch_lora_weights.safetensors"
    hub.repositories |= {
        "o/usual": Repository({usual: lora(1), "b.safetensors": lora(2), f"old/{usual}": lora(3)}),
        "o/Own-Name": Repository({"own-name.safetensors": lora(4), "b.safetensors": lora(5)}),
        "o/many": Repository({f"v{i}.safetensors": lora(i) for i in range(10)}),
        "o/pickles": Repository({"lora.bin": b"\x80", "x.ckpt": b"\x80"}),
        "o/none": Repository({"README.md": b"hi"}),
    }
    built = library()
    assert content(built, "o/usual") == lora(1)
    assert content(built, "o/Own-Name") == lora(4)
    assert content(built, "o/many/v3.safetensors") == lora(3)
    assert content(built, f"o/usual/old/{usual}") == lora(3)
    several = refusal(built, "o/many")
    assert several.endswith("has several files: write o/many/FILE; there are: " + ", ".join(
        f"v{i}.safetensors" for i in range(8)) + ", … (10 in all)")  # fmt: skip
    assert "only pickles" in refusal(built, "o/pickles")
    assert "no .safetensors file" in refusal(built, "o/none")
    assert "no such file on the hub; there are: v0.safetensors" in refusal(built, "o/many/v77.safetensors")
    assert "no .safetensors file" in refusal(built, "o/pickles/lora.bin")


def test_the_hubs_pages_and_revisions(library, hub):
    """The address of a file's page, at a branch or a commit; an unknown revision is told."""
    hub.repositories["o/n"] = repository = Repository({"a.safetensors": lora(1), "b.safetensors": lora(2)})
    built = library()
    for name in (
        f"{hub.url}/o/n/blob/main/b.safetensors",
        f"{hub.url}/o/n/resolve/main/b.safetensors?download=true",
        f"https://huggingface.co/o/n/blob/{repository.commit}/b.safetensors",
        f"o/n/b.safetensors@{repository.commit}",
    ):
        assert content(built, name) == lora(2)
    assert "has no revision 'v9' on the hub" in refusal(built, "o/n/b.safetensors@v9")


def test_a_branch_that_moves_is_seen_and_a_commit_is_never_asked_again(library, hub):
    """Without the pause between questions."""
    hub.repositories["o/n"] = Repository({"a.safetensors": lora(1)})
    commit = hub.repositories["o/n"].commit
    built = library(fetch_revalidate=0)
    assert content(built, "o/n") == content(built, f"o/n@{commit}") == lora(1)
    hub.repositories["o/n"] = Repository({"a.safetensors": lora(2)})
    assert content(built, "o/n") == lora(2)
    count = len(hub.asked)
    assert content(built, f"o/n@{commit}") == lora(1)
    assert len(hub.asked) == count


def test_with_the_hub_away_the_cache_answers(library, hub):
    """What was fetched once works on; the rest says that the hub cannot be reached."""
    hub.repositories["o/n"] = Repository({"a.safetensors": lora(1)})
    built = library(fetch_revalidate=0)
    content(built, "o/n")
    hub.shutdown()
    hub.server_close()
    assert content(built, "o/n") == lora(1)
    assert "could not be reached" in refusal(built, "o/other")


def test_what_the_hub_refuses_is_told_with_the_remedy(library, hub):
    """Unknown or private, gated, closed, asked too often: one sentence each."""
    hub.repositories["o/gated"] = Repository({"a.safetensors": lora()}, refusal=(403, "GatedRepo"))
    hub.repositories["o/closed"] = Repository({"a.safetensors": lora()}, refusal=(403, ""))
    hub.repositories["o/busy"] = Repository({"a.safetensors": lora()}, refusal=(429, ""))
    hub.repositories["o/private"] = Repository({"a.safetensors": lora()}, refusal=(401, "RepoNotFound"))
    built = library()
    assert "was not found on the hub, or is private" in refusal(built, "o/nothing")
    assert "was not found on the hub, or is private" in refusal(built, "o/private")
    assert "is gated on the hub: accept its terms" in refusal(built, "o/gated")
    assert "is not open to this server" in refusal(built, "o/closed")
    assert "wants fewer requests (status 429)" in refusal(built, "o/busy")


def test_the_operators_token_is_for_the_repositories_that_were_named(library, hub, caplog):
    """By default for none: whoever may name a repository could read all that the operator may."""
    caplog.set_level(logging.DEBUG)
    for owner in ("team", "other"):
        files = {"a.safetensors": lora()}
        hub.repositories[f"{owner}/n"] = Repository(files, refusal=(401, "RepoNotFound"), token="hf_secret")
    assert "private" in refusal(library(hf_token="hf_secret"), "team/n")
    built = library(hf_token="hf_secret", hf_token_repos=["team/*"])
    assert content(built, "team/n") == lora()
    assert "private" in refusal(built, "other/n")
    assert "hf_secret" not in caplog.text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (b"<!doctype html><title>Log in</title>" + bytes(9000), "an HTML page"),
        (b'{"error":"login"}', "JSON text"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (b"PK\x03\x04archive/data.pkl" + bytes(3000), "a pickle in a zip"),
        (lora()[:60], "cut short"),
        (lora()[:-4], ""),
        (b"", "an empty file"),
    ],
)
def test_what_is_no_lora_file_is_named_and_not_kept(tmp_path, library, web, data, words):
    """By its bytes, whatever its name says."""
    web.pages["/x.safetensors"] = Page(data)
    assert words in refusal(library(), f"{web.url}/x.safetensors")
    assert list((tmp_path / "cache" / "blobs").iterdir()) == []


def test_an_archive_of_cog_sdxl_is_fetched(library, web):
    """Its address, as Replicate gives it; another archive is named for what it lacks, and not kept."""
    web.pages["/trained_model.tar"] = Page(packed())
    web.pages["/other.tar"] = Page(packed({"unet.safetensors": lora()}))
    build = library()
    assert content(build, f"{web.url}/trained_model.tar") == packed()
    assert "unet.safetensors, a whole model" in refusal(build, f"{web.url}/other.tar")


def test_a_transfer_that_breaks_off_is_finished(library, hub):
    """The store hangs up in the middle once."""
    hub.repositories["o/n"] = Repository({"a.safetensors": lora()}, cut_once={"a.safetensors": 100})
    assert content(library(), "o/n") == lora()
    assert hub.asked[-1].endswith("a.safetensors bytes=100-")


# The web


def test_any_address_brings_a_lora(library, web):
    """Through a redirect to a store; what stands behind the question mark is not told again."""
    web.pages |= {"/get": redirect(f"{web.url}/store/x?sig=1"), "/store/x": Page(lora(3), etag='"e"')}
    found = find(library(), f"{web.url}/get?token=s3cret")
    assert found.file.read_bytes() == lora(3)
    assert found.source == f"{web.url}/get"


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "https://127.0.0.1:1/x", "https://user@h/x"])
def test_addresses_are_guarded(tmp_path, target):
    """With the service's own settings, which allow nothing that is not public."""
    settings = Settings(data_dir=tmp_path, model="fake")
    assert policy_of(settings).networks == ()
    with pytest.raises(LoraError, match=r"must be https|has port|has a user name"):
        find(LoraLibrary.of(settings), target)


def test_too_large_a_lora_is_refused(library, web):
    """By the operator's limit."""
    web.pages["/x"] = Page(lora())
    assert "is too large" in refusal(library(lora_bytes=100), f"{web.url}/x")


def test_offline_fetches_nothing(library, web):
    """Not even from the cache's sites; names here work on."""
    web.pages["/x"] = Page(lora())
    for name in (f"{web.url}/x", "o/n", "civitai:1"):
        assert "was not found" in refusal(library(offline=True), name)
    assert web.asked == []


# Civitai


def test_every_way_to_name_a_civitai_version(library, civitai):
    """Page, page with version, download address, AIR, numbers; the hash that the site states is checked."""
    civitai.add(12, 34, lora(1))
    built = library()
    for name in (
        "https://civitai.com/models/12/pixel?modelVersionId=34", f"{civitai.url}/models/12",
        f"{civitai.url}/api/download/models/34?type=Model", "urn:air:sdxl:lora:civitai:12@34", "civitai:12@34",
        "civitai:12", "12@34",
    ):  # fmt: skip
        found = find(built, name)
        assert found.file.read_bytes() == lora(1)
        assert found.source.startswith("civitai:12@34")
    assert len(civitai.store.asked) == 1, "one content, fetched once"


def test_civitai_says_what_it_is_before_anything_is_fetched(library, civitai):
    """Another base model or type is an error; fine-tunes of SDXL, and names nobody knows yet, are fetched."""
    civitai.add(1, 1, lora(1), base="SD 1.5")
    civitai.add(2, 2, lora(2), base="Flux.1 D")
    civitai.add(3, 3, lora(3), kind="Checkpoint")
    civitai.add(4, 4, lora(4), kind="TextualInversion")
    civitai.add(5, 5, lora(5), base="Pony V7")
    fine = {6: "Pony", 7: "Illustrious", 8: "SDXL Lightning", 9: "Brand New", 10: "NoobAI", 11: "SDXL 0.9"}
    for number, base in fine.items():
        civitai.add(number, number, lora(number), base=base, kind="LoCon" if number == 6 else "LORA")
    built = library()
    assert "is a LoRA for SD 1.5 and not for SDXL" in refusal(built, "civitai:1@1")
    assert "is a LoRA for Flux.1 D and not for SDXL" in refusal(built, "civitai:2")
    assert "is a Checkpoint on Civitai, not a LoRA" in refusal(built, "civitai:3")
    assert "is a TextualInversion on Civitai" in refusal(built, "civitai:4@4")
    assert "is a LoRA for Pony V7" in refusal(built, "civitai:5@5")
    assert "is a LoRA for sd1 and not for SDXL" in refusal(built, "urn:air:sd1:lora:civitai:6@6")
    assert "is a checkpoint on Civitai" in refusal(built, "urn:air:sdxl:checkpoint:civitai:6@6")
    assert civitai.store.asked == []
    for number in fine:
        assert content(built, f"civitai:{number}@{number}") == lora(number)


def test_a_model_without_a_version_is_its_newest_for_sdxl(library, civitai):
    """The first in the site's order that is not for another base model."""
    civitai.add(1, 30, lora(30), base="Flux.1 D")
    civitai.add(1, 20, lora(20))
    civitai.add(1, 10, lora(10))
    assert content(library(), "civitai:1") == lora(20)
    assert "not of model 2" in refusal(library(), "civitai:2@20")


def test_civitais_refusals(library, civitai):
    """Not found, login needed, pickles alone, wrong bytes."""
    civitai.add(1, 1, lora(1))
    civitai.add(2, 2, lora(2), name="x.pt", metadata={"format": "PickleTensor"})
    civitai.add(3, 3, lora(3), hashes={"SHA256": "0" * 64})
    civitai.download_token = "key"
    assert "was not found on Civitai" in refusal(library(), "civitai:404")
    assert "needs a login on Civitai: the operator sets civitai_token" in refusal(library(), "civitai:1")
    assert "no .safetensors file on Civitai" in refusal(library(), "civitai:2")
    built = library(civitai_token="key")
    assert content(built, "civitai:1") == lora(1)
    assert "arrived with other bytes" in refusal(built, "civitai:3")
    assert all("authorization" not in headers for _, headers in civitai.store.asked)


def test_a_file_in_use_stays_while_the_cache_turns_over(tmp_path, library, web):
    """As long as what ``find`` gave lives, its file does."""
    built = library(cache_bytes=len(lora()) * 2)
    for number in range(6):
        web.pages[f"/{number}"] = Page(lora(number))
    kept = find(built, f"{web.url}/0")
    for number in range(1, 6):
        find(built, f"{web.url}/{number}")
    assert kept.file.read_bytes() == lora(0)
    assert len(list((tmp_path / "cache" / "blobs").iterdir())) == 2


@pytest.mark.parametrize("wrong", [{"fetch_allow": ["http://x"]}, {"fetch_allow": ["10.0.0.0/99"]}])
def test_wrong_settings_stop_the_start(tmp_path, wrong):
    """By name."""
    with pytest.raises(ConfigError, match="fetch_allow"):
        make_sites(Settings(data_dir=tmp_path, **wrong))


def test_the_names_on_disk_are_hashes(tmp_path, library, web):
    """Nothing that a user writes becomes a path."""
    web.pages["/x"] = Page(lora())
    found = find(library(), f"{web.url}/x?../../../etc")
    assert found.file == Path(tmp_path / "cache" / "blobs" / f"{hashlib.sha256(lora()).hexdigest()}.safetensors")
