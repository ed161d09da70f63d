"""Faster ways to run the UNet give the same answer, and LoRAs go on and off as before: nothing is copied or frozen."""

import copy
import logging
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters

from impasto.engine import accel as switchboard
from impasto.engine.accel import Accel, accelerate
from impasto.engine.graphs import Graphed
from impasto.errors import ConfigError
from impasto.lora.apply import Adapters
from impasto.models.fused import FusedAttention, fuse_projections
from impasto.types import LoraRef
from tests.random_sdxl import save_random_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def unet(folder) -> UNet2DConditionModel:
    """A fresh UNet, in its plain form."""
    return UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).requires_grad_(False)


@pytest.fixture
def lora(unet, tmp_path) -> str:
    """A LoRA on every projection of every attention, on a feed-forward layer and on a convolution."""
    tensors = {}
    torch.manual_seed(3)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features) * 0.3
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2) * 0.3
    tensors["unet.down_blocks.1.resnets.0.conv2.lora_A.weight"] = torch.randn(2, 16, 3, 3) * 0.3
    tensors["unet.down_blocks.1.resnets.0.conv2.lora_B.weight"] = torch.randn(16, 2, 1, 1) * 0.3
    save_file(tensors, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


@torch.inference_mode()
def answer(unet, rows=2, side=16, seed=0):
    """The UNet's output for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    added = {
        "text_embeds": torch.randn(rows, 24, generator=generator),
        "time_ids": torch.full((rows, 6), 512.0),
    }
    return unet(
        torch.randn(rows, 4, side, side, generator=generator),
        torch.full((rows,), 500),
        encoder_hidden_states=torch.randn(rows, 77, 40, generator=generator),
        added_cond_kwargs=added,
        return_dict=False,
    )[0].clone()


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def weights(unet) -> dict:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def wearing(adapters, path, scale=1.0):
    """Run with this LoRA on."""
    return adapters.active(adapters.resolve([LoraRef(path, scale)]))


def is_tied(unet) -> bool:
    """Whether every fused weight is the memory of its parts."""
    fused = [module for module in unet.modules() if isinstance(module, FusedAttention)]
    assert len(fused) == 2 * sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules()) > 0
    return all(
        part.weight.untyped_storage().data_ptr() == attention.fused_weight.untyped_storage().data_ptr()
        for attention in fused
        for part in (attention.to_k, attention.to_v)
    )


WAYS = {
    "fused": Accel(fuse_projections=True),
    "channels last": Accel(channels_last=True),
    "both": Accel(fuse_projections=True, channels_last=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_the_same_and_loras_go_on_and_off(folder, unet, lora, way):
    """Equal to the plain UNet without a LoRA, with one, and after it, to 1e-5; the weights come back bit for bit."""
    plain = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).requires_grad_(False)
    before = weights(unet)
    accelerate(unet, WAYS[way], CPU)
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    assert relative(answer(unet), answer(plain)) <= 1e-5

    with wearing(adapters, lora), wearing(reference, lora):
        with_lora = answer(plain)
        assert relative(answer(unet), with_lora) <= 1e-5
    adapters.restore()
    reference.restore()

    assert relative(with_lora, answer(plain)) > 1e-3, "the LoRA does nothing, and the test shows nothing"
    assert relative(answer(unet), answer(plain)) <= 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_fusing_takes_no_memory_and_shows_loras_the_same_modules(unet):
    """The names and kinds of modules and the stored tensors stay; the parameters' memory does not grow."""

    def layers(network):
        return [(n, type(m)) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def held(network):
        tensors = [*network.parameters(), *network.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    before = layers(unet), list(unet.state_dict()), held(unet)
    fuse_projections(unet)
    assert (layers(unet), list(unet.state_dict()), held(unet)) == before
    assert is_tied(unet)


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.to(torch.float64).to(torch.float32),
        lambda unet: unet.to(memory_format=torch.channels_last),
        copy.deepcopy,
        lambda unet: fuse_projections(unet) or unet,
    ],
    ids=["cast", "channels last", "copied", "fused again"],
)
def test_fused_weights_stay_tied(unet, lora, change):
    """Whatever gives the weights new memory ties them again, so a LoRA is never half on."""
    plain = copy.deepcopy(unet)
    fuse_projections(unet)
    with torch.inference_mode(change is not copy.deepcopy):  # as the engine runs; copies are made before it does
        unet = change(unet)
    assert is_tied(unet)
    with torch.inference_mode(), wearing(Adapters({"unet": unet}), lora), wearing(Adapters({"unet": plain}), lora):
        assert relative(answer(unet), answer(plain)) <= 1e-5


def test_untied_weights_would_be_noticed(unet, lora):
    """The control of the tests above: with a copied fused weight, a LoRA changes the answer less than it should."""
    plain = copy.deepcopy(unet)
    fuse_projections(unet)
    for module in unet.modules():
        if isinstance(module, FusedAttention):
            module.fused_weight = module.fused_weight.clone()
    assert not is_tied(unet)
    with wearing(Adapters({"unet": unet}), lora), wearing(Adapters({"unet": plain}), lora):
        assert relative(answer(unet), answer(plain)) > 1e-4


def test_a_masked_attention_goes_the_plain_way(unet):
    """A mask is honoured, through the same weights."""
    plain = copy.deepcopy(unet).mid_block.attentions[0].transformer_blocks[0].attn2
    fuse_projections(unet)
    fused = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hidden, tokens, mask = torch.randn(2, 9, 16), torch.randn(2, 7, 40), torch.zeros(2, 1, 7)
    mask[..., 3:] = -10000
    assert torch.equal(fused(hidden, tokens, mask), plain(hidden, tokens, mask))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch's own compiler uses what torch deprecates
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_compiled_once_for_every_lora_batch_and_size(unet, lora):
    """After the first calls of one and of several rows, no LoRA change, batch or size compiles anything anew."""
    plain = copy.deepcopy(unet)
    accelerate(unet, Accel(compile=True, fuse_projections=True), CPU)
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    torch._dynamo.reset()
    counters.clear()
    for rows in (2, 1):
        assert relative(answer(unet, rows), answer(plain, rows)) <= 1e-4
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled, and the test shows nothing"

    for scale in (1.0, -0.5):
        with wearing(adapters, lora, scale), wearing(reference, lora, scale):
            for rows, side in ((2, 16), (1, 16), (3, 16), (8, 16), (2, 24), (1, 32), (77, 8)):
                assert relative(answer(unet, rows, side), answer(plain, rows, side)) <= 1e-4
    adapters.restore()
    reference.restore()

    assert relative(answer(unet), answer(plain)) <= 1e-4
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompile_limit"]


def test_what_cannot_be_had_is_logged_and_left_out(unet, caplog, monkeypatch):
    """No compiler, no CUDA: a line in the log says so, and the plain UNet runs."""
    before = answer(unet)

    def no_compiler(*_args, **_kwargs):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING):
        accelerate(unet, Accel(compile=True, cuda_graphs=True), CPU)
    assert [record.message for record in caplog.records] == [
        "compile is off: nothing can be compiled for cpu (no compiler here)",
        "cuda_graphs is off: the device is cpu, not cuda",
    ]
    assert torch.equal(answer(unet), before)


def test_graphs_and_moving_weights_exclude_each_other(caplog):
    """A graph reads weights where they were when it was recorded."""
    with caplog.at_level(logging.WARNING):
        assert not switchboard._can_record(Accel(cuda_graphs=True, offload="all"), torch.device("cuda"))
    assert "offload=all" in caplog.text
    assert switchboard._can_record(Accel(cuda_graphs=True, offload="encoders"), torch.device("cuda"))


def test_the_default_touches_nothing(unet):
    """No switch, no change: same classes, same memory, same forward."""
    before = [(type(module), id(module)) for module in unet.modules()]
    addresses = [tensor.data_ptr() for tensor in unet.parameters()]
    accelerate(unet, Accel(), CPU)
    assert [(type(module), id(module)) for module in unet.modules()] == before
    assert [tensor.data_ptr() for tensor in unet.parameters()] == addresses
    assert "forward" not in vars(unet)


def test_without_cuda_a_graph_is_the_call_itself(unet):
    """Nothing is recorded, copied or changed."""
    seen = []

    def network(x, *, added, flag):
        seen.append((x, added, flag))
        return x, added["a"]

    graphed = Graphed(network)
    x, a = torch.ones(2), torch.zeros(3)
    output = graphed(x, added={"a": a}, flag=None)

    assert output[0] is x and output[1] is a
    assert seen == [(x, {"a": a}, None)]
    assert graphed.recorded == 0
    plain = answer(unet)
    unet.forward = Graphed(unet.forward)
    assert torch.equal(answer(unet), plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Accel()),
        ("compile,channels_last", Accel(compile=True, channels_last=True)),
        (" fuse_projections , cuda_graphs ,", Accel(fuse_projections=True, cuda_graphs=True)),
        ("offload=encoders,vae_tiling = on", Accel(offload="encoders", vae_tiling="on")),
    ],
)
def test_switches_are_read_from_a_comma_list(text, expected):
    """Switches by name, choices by name=value."""
    assert Accel.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("warp", "unknown item 'warp'"),
        ("compile=yes", "unknown item 'compile=yes'"),
        ("offload", "offload=none|encoders|all"),
        ("offload=", "must be one of none, encoders, all"),
        ("offload=disk", "must be one of none, encoders, all"),
        ("vae_tiling=maybe", "must be one of auto, on, off"),
        ("compile,compile", "given twice"),
    ],
)
def test_a_wrong_list_is_a_configuration_error_that_names_what_is_right(text, phrase):
    """Nothing is ignored."""
    with pytest.raises(ConfigError) as caught:
        Accel.parse(text)
    assert phrase in str(caught.value)
