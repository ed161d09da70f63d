"""LoRAs made ready by another thread: read once, exact, within the budgets, and in nobody's way."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from impasto.engine.engine import Engine
from impasto.errors import LoraError
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.cache import ByteCache, FileState, ParsedFiles
from impasto.lora.contents import LoraContents
from impasto.lora.courtesy import LONGEST, SHARE, courteous, give_way
from impasto.lora.formats import read_lora
from impasto.lora.keys import TargetNames
from impasto.lora.weights import Weights
from impasto.types import Failed, Finished, GenerationRequest, LoraRef

PATIENCE = 60.0  # seconds until a test that waits for a thread has failed
MOMENT = 0.2  # seconds in which nothing must happen; longer on a busy machine does no harm
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # of the built-in model
MAGNITUDE = torch.tensor([[1.0], [2.0], [0.5], [1.5], [1.0], [1.0], [2.0], [1.0], [1.0], [3.0]])


class Small(nn.Module):
    """Two weights that LoRAs change."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(12, 10)
        self.to_k = nn.Linear(12, 10)


def write(path, seed=0, module="to_q", width=(10, 12), rank=4, **beside):
    """Write a real file and return its name."""
    generator = torch.Generator().manual_seed(seed)
    name = f"unet.{module}"
    halves = {
        f"{name}.lora_A.weight": torch.randn(rank, width[1], generator=generator),
        f"{name}.lora_B.weight": torch.randn(width[0], rank, generator=generator),
    }
    save_file(halves | {f"{name}.{key}": value for key, value in beside.items()}, path)
    return str(path)


class Gated:
    """The real reader, which waits at a gate for files that the test names."""

    def __init__(self, *held):
        self.held = held
        self.open = threading.Event()
        self.arrived = threading.Event()
        self.reads = []

    def __call__(self, path, names, field):
        self.reads.append(path.name)
        if path.name in self.held:
            self.arrived.set()
            assert self.open.wait(PATIENCE)
        return read_lora(path, names, field)


class Thread(threading.Thread):
    """Runs something, and tells what it returned or raised."""

    def __init__(self, do):
        super().__init__(daemon=True)
        self._do = do
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self._do()
        except Exception as error:  # noqa: BLE001  (the test asks for it)
            self.error = error

    def ended(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return self


@pytest.fixture
def reader():
    made = Gated("slow.safetensors")
    yield made
    made.open.set()


# Reading


def test_threads_that_want_one_file_read_it_once(tmp_path, reader):
    """The second waits for the first, and both have the same patches."""
    slow = write(tmp_path / "slow.safetensors")
    adapters = Adapters({"unet": Small()}, read=reader)
    first = Thread(lambda: adapters.preload([LoraRef(slow)]))
    assert reader.arrived.wait(PATIENCE)
    second = Thread(lambda: adapters.resolve([LoraRef(slow)]))
    time.sleep(MOMENT)
    assert second.is_alive()
    reader.open.set()
    assert first.ended().error is None
    assert second.ended().result == adapters.resolve([LoraRef(slow)])
    assert reader.reads == ["slow.safetensors"]


def test_nobody_waits_for_a_file_of_others(tmp_path, reader):
    """While one is read, another is read, put on and taken off."""
    slow, quick = write(tmp_path / "slow.safetensors"), write(tmp_path / "quick.safetensors", 1)
    adapters = Adapters({"unet": Small()}, read=reader)
    thread = Thread(lambda: adapters.preload([LoraRef(slow)]))
    assert reader.arrived.wait(PATIENCE)
    with adapters.active(adapters.resolve([LoraRef(quick)])):
        assert thread.is_alive()
    adapters.restore()
    assert thread.is_alive()


def test_files_are_read_ahead_one_at_a_time_and_known_ones_at_once(tmp_path, reader):
    """It is work beside a thread that matters more; but nobody whose file is read already waits for that."""
    slow, known = write(tmp_path / "slow.safetensors"), write(tmp_path / "known.safetensors", 1)
    new = write(tmp_path / "new.safetensors", 2)
    adapters = Adapters({"unet": Small()}, read=reader)
    adapters.preload([LoraRef(known)])
    first = Thread(lambda: adapters.preload([LoraRef(slow)]))
    assert reader.arrived.wait(PATIENCE)
    second = Thread(lambda: adapters.preload([LoraRef(new)]))
    adapters.preload([LoraRef(known, 0.3)])
    time.sleep(MOMENT)
    assert second.is_alive() and first.is_alive()
    assert reader.reads == ["known.safetensors", "slow.safetensors"]
    reader.open.set()
    assert [first.ended().error, second.ended().error] == [None, None]
    assert sorted(reader.reads) == ["known.safetensors", "new.safetensors", "slow.safetensors"]


def test_a_file_that_nobody_wants_any_more_is_not_read(tmp_path, reader):
    """Its turn came too late."""
    adapters = Adapters({"unet": Small()}, read=reader)
    with pytest.raises(LoraError, match="not wanted any more"):
        adapters.preload([LoraRef(write(tmp_path / "a.safetensors"))], stop=lambda: True)
    assert reader.reads == []


@pytest.mark.parametrize("budget", [0, 10**6])
def test_whoever_waited_gets_a_file_that_is_too_large_to_keep(tmp_path, budget):
    """The budget says what stays, not what is read."""
    state = FileState.now(tmp_path / write(tmp_path / "a.safetensors"))
    gate, arrived, contents = threading.Event(), threading.Event(), LoraContents({})

    def read(path, field):
        arrived.set()
        assert gate.wait(PATIENCE)
        return contents

    files = ParsedFiles(read, budget)
    threads = [Thread(lambda: files.contents(state, "loras.0.path")) for _ in range(3)]
    assert arrived.wait(PATIENCE)
    gate.set()
    assert all(thread.ended().result is contents for thread in threads)
    assert files.bytes <= budget
    assert not files.awaited


def test_a_broken_file_fails_for_each_with_its_own_field(tmp_path, reader):
    """Also for one that waited for the other to read it; and the next good file is read as ever."""
    slow = tmp_path / "slow.safetensors"
    slow.write_bytes(b"no LoRA at all, whatever its name says")
    good = write(tmp_path / "good.safetensors")
    adapters = Adapters({"unet": Small()}, read=reader)
    first = Thread(lambda: adapters.preload([LoraRef(str(slow))]))
    assert reader.arrived.wait(PATIENCE)
    second = Thread(lambda: adapters.resolve([LoraRef(good), LoraRef(str(slow))]))
    time.sleep(MOMENT)
    reader.open.set()
    errors = [first.ended().error, second.ended().error]
    assert [type(error) for error in errors] == [LoraError, LoraError]
    assert [error.field for error in errors] == ["loras.0.path", "loras.1.path"]
    assert errors[0].problem == errors[1].problem
    assert len(adapters.resolve([LoraRef(good)])) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, reader):
    """What was read may be half of one and half of another; nothing of it is kept."""
    slow = write(tmp_path / "slow.safetensors")
    adapters = Adapters({"unet": Small()}, read=reader)
    thread = Thread(lambda: adapters.preload([LoraRef(slow)]))
    assert reader.arrived.wait(PATIENCE)
    write(tmp_path / "slow.safetensors", seed=1, rank=3)
    reader.open.set()
    assert "changed" in thread.ended().error.problem
    assert adapters.held_bytes["parsed"] == 0


def test_a_cache_of_many_threads_keeps_its_budget_and_its_count():
    """Whatever they do at once, the bytes told are those of what is held."""
    cache = ByteCache(1000)

    def work(start):
        for number in range(start, start + 3000):
            cache.put(number % 50, number, number % 300)
            cache.get((number * 7) % 50)
            cache.take((number * 13) % 50)
            assert cache.bytes <= 1000

    threads = [Thread(lambda start=start: work(start)) for start in (0, 17, 31, 44)]
    assert [thread.ended().error for thread in threads] == [None] * 4
    assert cache.bytes == sum(size for _, size in cache._held.values())


# Making ready


@pytest.mark.parametrize("beside", [{}, {"lora_magnitude_vector": MAGNITUDE.flatten()}], ids=["lora", "dora"])
def test_a_set_made_ready_by_another_thread_gives_the_same_bits(tmp_path, beside):
    """While that thread works, another set is on: no number of a patched weight gets into what it makes."""
    loras = [
        LoraRef(write(tmp_path / "a.safetensors", 1, **beside), 0.7),
        LoraRef(write(tmp_path / "b.safetensors", 2)),
    ]
    other = write(tmp_path / "other.safetensors", 3)
    torch.manual_seed(0)
    networks = [Small(), Small()]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, ahead = (Adapters({"unet": network}) for network in networks)
    with ahead.active(ahead.resolve([LoraRef(other)])):
        assert Thread(lambda: ahead.preload(loras)).ended().error is None
    with plain.active(plain.resolve(loras)), ahead.active(ahead.resolve(loras)):
        assert torch.equal(networks[0].to_q.weight, networks[1].to_q.weight)
        assert not torch.equal(networks[0].to_q.weight, networks[0].to_k.weight)
    plain.restore(), ahead.restore()
    assert torch.equal(networks[0].to_q.weight, networks[1].to_q.weight)


@pytest.mark.parametrize("budgets", [Budgets(), Budgets(4000, 4000), Budgets(0, 0)], ids=["all", "few", "none"])
def test_switches_beside_a_thread_that_makes_sets_ready_give_the_same_bits(tmp_path, budgets):
    """Sets come and go on one thread while another works out the next ones; each is what it is without that."""
    files = [write(tmp_path / f"{i}.safetensors", i) for i in range(3)]
    files.append(write(tmp_path / "dora.safetensors", 3, lora_magnitude_vector=MAGNITUDE.flatten()))
    sets = [[LoraRef(a, 0.5), LoraRef(b, -0.3)] for a in files for b in files if a != b]
    torch.manual_seed(0)
    networks = [Small(), Small()]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, ahead = Adapters({"unet": networks[0]}), Adapters({"unet": networks[1]}, budgets)
    enough = threading.Event()

    def work():
        rounds = 0
        while not enough.is_set():
            for loras in sets[::-1]:
                ahead.preload(loras, lambda: True)
            rounds += 1
        return rounds

    thread = Thread(work)
    for loras in sets * 5:
        with plain.active(plain.resolve(loras)), ahead.active(ahead.resolve(loras)):
            assert torch.equal(networks[0].to_q.weight, networks[1].to_q.weight)
    enough.set()
    assert thread.ended().error is None and thread.result


def test_its_first_switch_finds_it_ready(tmp_path):
    """Counted as such, and its file is not wanted again; one that nobody made ready is counted too."""
    reader = Gated()
    paths = [write(tmp_path / f"{i}.safetensors", i) for i in range(2)]
    adapters = Adapters({"unet": Small()}, Budgets(parsed=0), read=reader)
    adapters.preload([LoraRef(paths[0])])
    loras = [adapters.resolve([LoraRef(path)]) for path in paths]
    reader.reads.clear()
    for one in loras:
        with adapters.active(one):
            pass
    assert reader.reads == ["1.safetensors"]
    assert (adapters.counts.hits, adapters.counts.misses) == (1, 1)


@pytest.mark.parametrize("budgets", [Budgets(0, 0), Budgets(10**4, 10**4), Budgets()])
def test_what_is_made_ready_keeps_the_budgets(tmp_path, budgets):
    """However many sets are asked for ahead of time."""
    adapters = Adapters({"unet": Small()}, budgets)
    for index in range(20):
        adapters.preload([LoraRef(write(tmp_path / f"{index}.safetensors", index, rank=16))])
        held = adapters.held_bytes
        assert held["parsed"] <= budgets.parsed and held["prepared"] <= budgets.prepared
        assert (held["prepared"] > 0) == (budgets.prepared > 0)


def test_a_file_replaced_after_it_was_made_ready_is_used_as_it_is_now(tmp_path):
    """Nobody gets a LoRA that is not there any more."""
    torch.manual_seed(0)
    network = Small()
    own = network.to_q.weight.detach().clone()
    path = write(tmp_path / "a.safetensors", 1)
    adapters = Adapters({"unet": network})
    adapters.preload([LoraRef(path)])
    write(tmp_path / "a.safetensors", 2, rank=3)
    names = TargetNames(Weights({"unet": network}).shapes())
    (patch,) = read_lora(tmp_path / "a.safetensors", names).patches.values()
    with adapters.active(adapters.resolve([LoraRef(path)])):
        assert torch.allclose(network.to_q.weight, own + patch.delta(own.shape), atol=1e-5)


# Going second


def test_a_courteous_thread_rests_while_others_are_busy():
    """And for no longer; nobody else ever rests."""
    busy = [True]

    def seconds(turns=5):
        start = time.perf_counter()
        for _ in range(turns):
            until = time.thread_time() + 0.01
            while time.thread_time() < until:
                pass
            give_way()
        return time.perf_counter() - start

    with courteous(lambda: busy[0]):
        assert seconds() >= 5 * min(LONGEST, 0.01 * (1 / SHARE - 1))
        assert Thread(lambda: [give_way() for _ in range(10)]).ended().error is None
    rests = []
    with courteous(lambda: rests.append(1) or False):
        seconds()
    assert len(rests) == 5
    seconds()
    assert len(rests) == 5


def test_a_thread_that_is_waited_for_does_not_rest(tmp_path, reader):
    """Else whoever waits would wait for its politeness."""
    slow = write(tmp_path / "slow.safetensors")
    adapters = Adapters({"unet": Small()}, read=reader)
    first = Thread(lambda: adapters.preload([LoraRef(slow)], lambda: True))
    assert reader.arrived.wait(PATIENCE)
    assert not adapters._files.awaited
    second = Thread(lambda: adapters.resolve([LoraRef(slow)]))
    deadline = time.monotonic() + PATIENCE
    while not adapters._files.awaited and time.monotonic() < deadline:
        time.sleep(0.01)
    assert adapters._files.awaited
    reader.open.set()
    first.ended(), second.ended()
    assert not adapters._files.awaited


# In the engine


@pytest.fixture(scope="module")
def engine():
    return Engine.load("builtin", device="cpu")


def request(*loras, steps=2, **changes):
    fields = {"width": 256, "height": 256, "num_inference_steps": steps, "seed": 1} | changes
    return GenerationRequest("a red fox", loras=tuple(LoraRef(lora) for lora in loras), **fields)


def builtin_lora(path, engine):
    width = engine._model.base.unet.get_submodule(LAYER).in_features
    return write(path, module=LAYER, width=(width, width))


def run(engine):
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_steps_go_on_while_a_file_is_made_ready_and_stop_for_one_that_is_not(tmp_path, engine, monkeypatch):
    """A job in progress ends while the file of another is still being parsed; handed in cold, that job holds it up."""
    slow = builtin_lora(tmp_path / "slow.safetensors", engine)
    gate, arrived = threading.Event(), threading.Event()
    read = engine._adapters._files._read

    def held(path, field):
        arrived.set()
        assert gate.wait(PATIENCE)
        return read(path, field)

    monkeypatch.setattr(engine._adapters._files, "_read", held)
    engine.submit(request(steps=3), "first")
    preload = Thread(lambda: engine.preload(request(slow)))
    assert arrived.wait(PATIENCE)
    assert isinstance(run(engine)[-1], Finished)
    assert preload.is_alive()
    gate.set()
    assert preload.ended().error is None

    gate.clear()  # what is read from now on is held, and this job reads nothing
    engine.submit(request(slow), "second")
    assert isinstance(run(engine)[-1], Finished)

    engine._adapters.clear()  # nobody made it ready: the control
    arrived.clear()
    engine.submit(request(slow), "third")
    stepping = Thread(lambda: run(engine))
    assert arrived.wait(PATIENCE)
    time.sleep(MOMENT)
    assert stepping.is_alive() and "third" not in engine._running
    gate.set()
    assert isinstance(stepping.ended().result[-1], Finished)


def test_a_broken_file_fails_its_own_job_at_its_start(tmp_path, engine):
    """With the words that it has without being made ready, while another job goes on."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08" + bytes(7) + b"{broken}")
    engine.submit(request(str(broken)), "before")
    (plain,) = [event for event in run(engine) if isinstance(event, Failed)]
    with pytest.raises(LoraError) as error:
        engine.preload(request(str(broken)))
    engine.submit(request(), "good")
    engine.submit(request(str(broken)), "after")
    events = run(engine)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == "after"
    assert failed.error.located == plain.error.located == error.value.located
    assert [event.request_id for event in events if isinstance(event, Finished)] == ["good"]
