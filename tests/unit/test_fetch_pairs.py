"""PEFT folders on the hub: the configuration that holds alpha and ranks comes along and lies beside the weights."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from impasto.config import Settings
from impasto.errors import LoraError
from impasto.fetch.pairs import Beside, Pairs
from impasto.lora.apply import Adapters
from impasto.types import LoraRef
from impasto.worker.loras import LoraLibrary
from tests.hub_server import Repository, running_hub

ROOT = Path(__file__).parents[2]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGET = "base_model.model.to_q"


def weights(mark=1.0):
    """A PEFT file of rank 2 without an alpha."""
    return save(
        {f"{TARGET}.lora_A.weight": torch.full((2, 4), mark), f"{TARGET}.lora_B.weight": torch.full((4, 2), 1.0)}
    )


def config(**values):
    return json.dumps({"peft_type": "LORA", "r": 2, **values}).encode()


def repository(mark=1.0, folder="", **values):
    return Repository({f"{folder}{WEIGHTS}": weights(mark), f"{folder}{CONFIG}": config(**values)})


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def library(tmp_path, hub):
    """A library whose hub is the server above."""

    def build(**settings):
        reach = {"fetch_allow": ["127.0.0.1", "localhost"], "fetch_http": True, "fetch_ports": [hub.server_port]}
        given = {"model": "fake", "hf_endpoint": hub.url, "fetch_revalidate": 0}
        return LoraLibrary.of(Settings(data_dir=tmp_path, **{**given, **reach, **settings}))

    return build


def find(library, name="o/n"):
    return library.find(name, "loras.0.path", "k1")


def added(file):
    """What the file, read and applied as a worker does it, adds to every weight of a linear of zeros."""
    network = nn.ModuleDict({"to_q": nn.Linear(4, 4, bias=False)})
    nn.init.zeros_(network["to_q"].weight)
    adapters = Adapters({"unet": network})
    with adapters.active(adapters.resolve([LoraRef(str(file))])):
        [value] = network["to_q"].weight.unique().tolist()
    return value


def refusal(library, name="o/n"):
    with pytest.raises(LoraError) as error:
        find(library, name)
    return error.value.problem


def pairs(tmp_path):
    return list((tmp_path / "cache" / "pairs").iterdir())


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"lora_alpha": 8}, 2 * 8 / 2), ({"lora_alpha": 8, "use_rslora": True}, 2 * 8 / 2**0.5),
     ({"lora_alpha": 8, "alpha_pattern": {"to_q": 1}}, 2 * 1 / 2), ({}, 2.0)],
)  # fmt: skip
def test_alpha_and_patterns_of_a_hub_folder_count(library, hub, values, expected):
    """The strength is the trainer's; without the configuration it would be 1."""
    hub.repositories["o/n"] = repository(**values)
    assert added(find(library()).file) == pytest.approx(expected)


def test_every_way_to_name_the_file_brings_its_configuration(library, hub):
    """The repository, the file, a file in a folder, the address of its page or its download, a commit."""
    hub.repositories |= {"o/n": repository(lora_alpha=8), "o/deep": repository(folder="step-10/unet/", lora_alpha=8)}
    hub.repositories["o/two"] = repository(lora_alpha=8)
    hub.repositories["o/two"].files["other.safetensors"] = weights(3.0)
    built = library()
    for name in (
        "o/n", f"o/n/{WEIGHTS}", "o/deep", f"o/deep/step-10/unet/{WEIGHTS}", "o/two",
        f"{hub.url}/o/n/blob/main/{WEIGHTS}", f"https://huggingface.co/o/n/resolve/main/{WEIGHTS}?download=true",
        f"o/n@{hub.repositories['o/n'].commit}",
    ):  # fmt: skip
        found = find(built, name)
        assert (found.file.name, added(found.file)) == (WEIGHTS, 8.0)
        assert found.file.with_name(CONFIG).read_bytes() == config(lora_alpha=8)


def test_equal_weights_with_another_configuration_are_another_lora(tmp_path, library, hub):
    """The bytes are kept once, each pair by itself; an older request's file does not change under it."""
    hub.repositories |= {"o/n": repository(lora_alpha=8), "o/m": repository(lora_alpha=4)}
    built = library()
    first, second = find(built, "o/n"), find(built, "o/m")
    assert (added(first.file), added(second.file)) == (8.0, 4.0)
    hub.repositories["o/n"] = repository(lora_alpha=2)
    third = find(built, "o/n")
    assert (added(first.file), added(third.file)) == (8.0, 2.0)
    assert len(list((tmp_path / "cache" / "blobs").iterdir())) == 1
    assert len(pairs(tmp_path)) == 3


def test_a_file_without_a_configuration_is_a_file_alone(tmp_path, library, hub):
    """So is one under another name, whatever lies beside it."""
    hub.repositories["o/n"] = Repository({WEIGHTS: weights()})
    hub.repositories["o/m"] = Repository({"x.safetensors": weights(), CONFIG: config(lora_alpha=8)})
    for name in ("o/n", "o/m"):
        assert find(library(), name).file.parent.name == "blobs"
    assert pairs(tmp_path) == []


def test_a_configuration_that_cannot_be_had_is_an_error(tmp_path, library, hub):
    """Never a LoRA of another strength: broken, too large, or no JSON."""
    hub.repositories["o/n"] = repository(lora_alpha=8)
    hub.repositories["o/n"].failing.add(CONFIG)
    assert "comes with adapter_config.json, which was answered with status 500" in refusal(library())
    hub.repositories["o/n"] = Repository({WEIGHTS: weights(), CONFIG: b" " * (2**18 + 1)})
    assert "comes with adapter_config.json, which is too large" in refusal(library())
    hub.repositories["o/n"] = Repository({WEIGHTS: weights(), CONFIG: b"<html>"})
    with pytest.raises(LoraError, match="adapter configuration that is no JSON object"):
        added(find(library()).file)


def test_with_the_hub_away_the_cache_has_both(library, hub):
    """Also where only the configuration is away."""
    hub.repositories["o/n"] = repository(lora_alpha=8)
    built = library()
    find(built)
    hub.repositories["o/n"].failing.add(CONFIG)
    assert added(find(built).file) == 8.0
    hub.shutdown()
    hub.server_close()
    assert added(find(built).file) == 8.0


def test_a_pair_goes_with_its_file_and_comes_again(tmp_path, library, hub):
    """When the cache is full; one in use stays."""
    hub.repositories |= {f"o/{i}": repository(float(i), lora_alpha=8) for i in range(1, 6)}
    built = library(cache_bytes=2 * len(weights()))
    kept = find(built, "o/1")
    for number in range(2, 6):
        find(built, f"o/{number}").held.release()
    assert added(kept.file) == 8.0
    assert len(pairs(tmp_path)) == 2
    assert added(find(built, "o/2").file) == 16.0


def test_half_a_pair_is_no_pair(tmp_path, library, hub):
    """Whatever was deleted of it by hand or by a crash is made again."""
    hub.repositories["o/n"] = repository(lora_alpha=8)
    built = library(fetch_revalidate=600)
    for lost in (CONFIG, WEIGHTS):
        find(built).held.release()
        [pair] = pairs(tmp_path)
        (pair / lost).unlink()
        assert added(find(built).file) == 8.0
    (tmp_path / "cache" / "pairs" / "draft-of-the-dead").mkdir()
    hub.repositories["o/m"] = repository(3.0)
    find(built, "o/m")
    assert all(not path.name.startswith("draft") for path in pairs(tmp_path))


def test_a_pair_in_the_index_opens_nothing_elsewhere(tmp_path, library, hub):
    """A spoilt index is a miss."""
    hub.repositories["o/n"] = repository(lora_alpha=8)
    built = library(fetch_revalidate=600)
    find(built)
    [entry] = (tmp_path / "cache" / "index").iterdir()
    good = json.loads(entry.read_bytes())
    outside = tmp_path / ("0" * 64 + "-" + "0" * 64)
    outside.mkdir()
    for bad in ("../blobs", f"../{outside.name}", 7, "0" * 64 + "-" + "0" * 64, ""):
        entry.write_text(json.dumps(good | {"pair": bad}))
        assert added(find(built).file) == 8.0


def test_many_configurations_of_one_file_are_bounded(tmp_path, monkeypatch):
    """The pairs used longest ago go."""
    monkeypatch.setattr("impasto.fetch.pairs.MOST_PAIRS", 3)
    for name in ("blobs", "pairs"):
        (tmp_path / name).mkdir()
    blob = tmp_path / "blobs" / "x"
    blob.write_bytes(b"x")
    made = Pairs(tmp_path / "pairs")
    names = [made.make(blob, "0" * 64, Beside("", CONFIG, WEIGHTS, 9), bytes([number])) for number in range(5)]
    made.use(names[0])
    made.trim()
    assert [made.find(name) is not None for name in names] == [True, False, False, True, True]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from impasto.config import Settings
from impasto.worker.loras import LoraLibrary
settings = Settings(data_dir=Path(sys.argv[1]), model="fake", hf_endpoint=sys.argv[2], fetch_revalidate=0,
                    fetch_allow=["127.0.0.1", "localhost"], fetch_http=True, fetch_ports=[int(sys.argv[3])])
library = LoraLibrary.of(settings)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    found = library.find("o/n", "loras.0.path", "k1")
    assert found.file.with_name("adapter_config.json").is_file()
    print(found.file, flush=True)
"""


def test_two_workers_and_many_threads_make_one_pair(tmp_path, library, hub):
    """At the same moment, again and again; nobody ever sees the weights alone."""
    hub.repositories["o/n"] = repository(lora_alpha=8)
    command = [sys.executable, "-c", CHILD, str(tmp_path), hub.url, str(hub.server_port), str(ROOT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        built = library()
        with ThreadPoolExecutor(4) as pool:
            seen = {added(found.file) for found in pool.map(lambda _: find(built), range(20))}
        lines = [worker.communicate(timeout=60)[0].splitlines() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert seen == {8.0}
    assert [len(found) for found in lines] == [20, 20]
    digests = [hashlib.sha256(data).hexdigest() for data in (weights(), config(lora_alpha=8))]
    assert {Path(line).parent.name for found in lines for line in found} == {"-".join(digests)}
    assert len(pairs(tmp_path)) == 1
