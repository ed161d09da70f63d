"""Models of the hub, from a server on loopback that speaks its protocol: only what is needed, once, and clear words."""

import json
import logging
from functools import partial

import pytest
import torch

from impasto.errors import ModelError
from impasto.models.catalog import PARTS, find_model
from impasto.models.hub import fetch_model, wanted_files
from impasto.models.networks import Dtypes, load_networks
from tests.hub_server import Repository, folder_files, running_hub
from tests.random_sdxl import save_random_refiner, save_random_sdxl

REPO = "painter/tiny-xl"
UNET = "unet/diffusion_pytorch_model.safetensors"
JUNK = {
    "README.md": b"words",
    "sd_xl.safetensors": b"x" * 50,
    "unet/diffusion_pytorch_model.bin": b"\x80",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"x",
    "unet/model.onnx": b"x",
    "text_encoder/flax_model.msgpack": b"x",
    "text_encoder/pytorch_model.bin": b"\x80",
    "vae_decoder/model.onnx": b"x",
    "feature_extractor/preprocessor_config.json": b"{}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny SDXL as a repository has it."""
    return folder_files(save_random_sdxl(tmp_path_factory.mktemp("models") / "m"))


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture
def fetch(hub, tmp_path):
    return partial(fetch_model, endpoint=hub.url, cache_dir=tmp_path / "cache")


def test_a_repository_loads_as_its_folder_does(hub, fetch, files):
    """Every network of the hub's copy is the folder's, bit for bit."""
    hub.repositories[REPO] = Repository(files | JUNK)
    source = find_model(REPO, fetch)
    assert (source.name, source.kind, source.native_side) == (REPO, "base", 1024)
    loaded = load_networks(source, Dtypes.all(torch.float32))
    assert len(loaded.text_encoders) == len(loaded.tokenizers) == 2
    assert (source.path / UNET).read_bytes() == files[UNET]


def test_only_what_is_loaded_is_fetched(hub, fetch, files):
    """No pickles, no other frameworks' weights, no leftovers of training."""
    hub.repositories[REPO] = Repository(files | JUNK)
    assert set(folder_files(fetch(REPO))) == set(files)
    assert not hub.fetched() & set(JUNK)


def test_a_second_load_fetches_nothing(hub, fetch, files):
    """It asks which commit the branch is at; of a named commit it asks nothing at all."""
    hub.repositories[REPO] = repository = Repository(files)
    first = fetch(REPO)
    hub.asked.clear()
    assert fetch(REPO) == first
    assert hub.asked == [f"GET /api/models/{REPO}/revision/main"]
    hub.asked.clear()
    assert fetch(REPO, repository.commit) == first
    assert hub.asked == []


def test_a_new_commit_fetches_what_changed(hub, fetch, files):
    """The snapshot is the new commit's; equal files are not fetched again."""
    hub.repositories[REPO] = Repository(files)
    old = fetch(REPO)
    hub.repositories[REPO] = Repository(files | {"unet/config.json": files["unet/config.json"] + b"\n"})
    hub.asked.clear()
    new = fetch(REPO)
    assert old != new
    assert hub.fetched() == {"unet/config.json"}


def test_with_the_hub_away_the_cache_serves(files, tmp_path):
    """Folders and single files alike."""
    with running_hub() as hub:
        fetch = partial(fetch_model, endpoint=hub.url, cache_dir=tmp_path)
        hub.repositories[REPO] = Repository(files | JUNK)
        there = [fetch(REPO), fetch(REPO, None, "sd_xl.safetensors")]
    assert [fetch(REPO), fetch(REPO, None, "sd_xl.safetensors")] == there


def test_half_precision_weights_are_enough(hub, fetch, files):
    """Where there are both, one set is fetched; ``full`` says which."""
    both = files | {f"{part}.fp16.safetensors": part.encode() for part in weights(files)}
    hub.repositories[REPO] = Repository(both)
    fetch(REPO)
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == set(both) - set(files)
    hub.asked.clear()
    fetch(REPO, full=True)
    assert hub.fetched() == {f"{part}.safetensors" for part in weights(files)}


def weights(files):
    return [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]


def test_weights_in_several_files_are_chosen_whole():
    """Shards and their index, of one variant, in every spelling."""
    plain = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [name.replace("model-", "model.fp16-") for name in plain]
    old = ["text_encoder/model-00001-of-00001.fp16.safetensors"]
    index = ["unet/diffusion_pytorch_model.safetensors.index.json"]
    half_index = ["unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
    everything = [*plain, *half, *old, *index, *half_index, "text_encoder/model.safetensors"]
    assert set(wanted_files(everything, PARTS, full=False)) == {*half, *half_index, *old}
    assert set(wanted_files(everything, PARTS, full=True)) == {*plain, *index, "text_encoder/model.safetensors"}


def test_a_refiner_needs_no_first_encoder(hub, fetch, tmp_path):
    """Its index names none."""
    hub.repositories[REPO] = Repository(folder_files(save_random_refiner(tmp_path / "r")))
    assert find_model(REPO, fetch).kind == "refiner"


def test_one_file_of_a_repository(hub, fetch, files):
    """Nothing else is fetched; the commit is what the branch was at."""
    hub.repositories[REPO] = repository = Repository(files | JUNK | {"deep/er/file.safetensors": b"deep"})
    path = fetch(REPO, None, "deep/er/file.safetensors")
    assert path.read_bytes() == b"deep"
    assert repository.commit in path.parts
    assert hub.fetched() == {"deep/er/file.safetensors"}


def test_ids_are_read_apart(tmp_path, monkeypatch):
    """Repository, revision, file; and a path that is there wins over the hub."""
    asked = []

    def fetch(*parts):
        asked.append(parts)
        raise ModelError("stop")

    for name in ("a/b", "a/b@v1", "a/b@refs/pr/1", "a/b/c.safetensors", "a/b/c/d.safetensors@v1", "A.1/b-c_d"):
        with pytest.raises(ModelError, match="stop"):
            find_model(name, fetch)
    assert asked == [
        ("a/b", None, None),
        ("a/b", "v1", None),
        ("a/b", "refs/pr/1", None),
        ("a/b", None, "c.safetensors"),
        ("a/b", "v1", "c/d.safetensors"),
        ("A.1/b-c_d", None, None),
    ]
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        find_model("a/b", fetch)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "/a/b", "./a/b", "a//b", "../a", "a/b.safetensors", "a/b c", "a/b@", ""]
)
def test_what_is_no_id_never_asks_the_hub(name, tmp_path, monkeypatch):
    """Mistyped paths stay here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        find_model(name, lambda *parts: pytest.fail("the hub was asked"))


def test_a_broken_transfer_goes_on_where_it_broke(hub, fetch):
    """The rest is asked for by its range, from the last whole block of the client (10 MiB)."""
    data = bytes(range(256)) * 2**10 * 48
    hub.repositories[REPO] = Repository({"xl.safetensors": data}, cut_once={"xl.safetensors": 11 * 2**20})
    assert fetch(REPO, None, "xl.safetensors").read_bytes() == data
    assert hub.asked[-1] == f"GET /cdn/{REPO}/xl.safetensors bytes={10 * 2**20}-"


def test_a_transfer_broken_early_starts_again(hub, fetch, files):
    """What came is not counted twice."""
    hub.repositories[REPO] = Repository(files, cut_once={UNET: 1000})
    assert (fetch(REPO) / UNET).read_bytes() == files[UNET]


def test_a_failed_fetch_is_completed_by_the_next(hub, fetch, files):
    """What was whole is kept; what was not is never taken for a file."""
    hub.repositories[REPO] = repository = Repository(files, failing={UNET})
    with pytest.raises(ModelError, match="could not be fetched whole"):
        fetch(REPO)
    hub.asked.clear()
    repository.failing.clear()
    assert (fetch(REPO) / UNET).read_bytes() == files[UNET]
    assert UNET in hub.fetched()
    assert len(hub.fetched()) < len(files) / 2


def test_a_part_of_a_model_is_not_served_offline(files, tmp_path, monkeypatch):
    """Half a download, and then no hub: an error, not half a model."""
    monkeypatch.setattr("huggingface_hub.file_download._DEFAULT_RETRY_ON_EXCEPTIONS", ())  # it would wait half a minute
    with running_hub() as hub:
        fetch = partial(fetch_model, endpoint=hub.url, cache_dir=tmp_path)
        hub.repositories[REPO] = Repository(files, failing={UNET})
        with pytest.raises(ModelError):
            fetch(REPO)
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        fetch(REPO)


def test_refusals_say_what_to_do(hub, fetch, files):
    """Not there, private, gated, forbidden, no such revision or file."""
    hub.repositories |= {
        "o/private": Repository(files, refusal=(401, "RepoNotFound")),
        "o/gated": Repository(files, refusal=(403, "GatedRepo")),
        "o/forbidden": Repository(files, refusal=(403, "")),
        "o/here": Repository(files),
    }
    cases = {
        ("o/nowhere", None, None): "neither a path here nor on the hub",
        ("o/private", None, None): "private: check the name, or set HF_TOKEN",
        ("o/gated", None, None): "accept its terms on its page, and set HF_TOKEN",
        ("o/gated", None, "x.safetensors"): "accept its terms on its page, and set HF_TOKEN",
        ("o/forbidden", None, None): "gated or private",
        ("o/here", "v9", None): "has no revision 'v9'",
        ("o/here", None, "x.safetensors"): "has no file 'x.safetensors'",
        ("o/a--b", None, None): "is no repository name",
    }
    for name, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            fetch(*name)


def test_a_token_opens_a_gated_repository(hub, fetch, files):
    """The same repository, with and without."""
    hub.repositories[REPO] = Repository(files, refusal=(403, "GatedRepo"), token="hf_right")
    with pytest.raises(ModelError, match="gated"):
        fetch(REPO, token="hf_wrong")
    assert (fetch(REPO, token="hf_right") / "model_index.json").exists()


def test_no_network_and_nothing_here(tmp_path):
    """One sentence, not a traceback of sockets."""
    with running_hub() as hub:
        url = hub.url
    with pytest.raises(ModelError, match=f"{REPO}' is not whole here, and the hub cannot be reached"):
        fetch_model(REPO, endpoint=url, cache_dir=tmp_path)


def test_a_full_disk_is_told_before_the_transfer(hub, fetch, files):
    """Nothing large is fetched for a model that cannot fit."""
    for name, file in ((UNET, None), ("sd_xl.safetensors", "sd_xl.safetensors")):
        hub.repositories[REPO] = Repository(files | JUNK, claimed_sizes={name: 10**18})
        with pytest.raises(ModelError, match=r"needs 1000000000\.0 GB, .* make room, or set HF_HOME"):
            fetch(REPO, None, file)
        assert name not in hub.fetched()


def test_repositories_that_hold_nothing_we_load(hub, fetch, files):
    """Pickles alone; another family; no pipeline but a single file. None of them fetches weights."""
    pickles = {name.replace(".safetensors", ".bin"): data for name, data in files.items()}
    index = json.loads(files["model_index.json"]) | {"_class_name": "StableDiffusionPipeline"}
    hub.repositories |= {
        "o/pickles": Repository(pickles),
        "o/sd15": Repository(files | {"model_index.json": json.dumps(index).encode()}),
        "o/single": Repository({"README.md": b"x", "xl.safetensors": b"x"}),
    }
    cases = {
        "o/pickles": r"no \.safetensors weights of unet, vae, text_encoder, text_encoder_2, and pickles are not",
        "o/sd15": "is a StableDiffusionPipeline, not an SDXL model",
        "o/single": r"no model_index\.json, .* such as o/single/xl\.safetensors",
    }
    for name, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            fetch(name)
    assert hub.fetched() == {"model_index.json"}


def test_fetching_says_so_once_and_draws_no_bar(hub, fetch, files, capfd, caplog):
    """A log line; bars belong on terminals."""
    hub.repositories[REPO] = Repository(files)
    with caplog.at_level(logging.INFO, "impasto"):
        fetch(REPO)
        fetch(REPO)
    [line] = [record.getMessage() for record in caplog.records if record.name == "impasto.models.hub"]
    assert line.startswith(f"fetching {len(files) - 1} files of {REPO} at {hub.repositories[REPO].commit[:12]}")
    assert capfd.readouterr().err == ""
