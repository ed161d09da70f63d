"""What makes CPUs faster gives the plain answers: blocked attention, packed weights, prompts that are kept, the VAE."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from impasto.engine import accel as switchboard
from impasto.engine.accel import Accel, accelerate, accelerate_vae, compile_whole, suited
from impasto.lora.apply import Adapters
from impasto.models import blocked, native
from impasto.models.blocked import MANY_KEYS, SCORES, attend, by_rows, in_blocks, suits
from impasto.models.fused import FusedAttention
from impasto.models.gated import PackedGeglu, pack_gates
from impasto.models.innermost import InnermostTransformer
from impasto.models.packed import Pack, PackedLinear, can_pack, pack_linears
from impasto.types import LoraRef
from tests.random_sdxl import save_random_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
HALF_ROUNDING = 0.01  # of bfloat16's 8 bits, after a softmax and two products
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this torch cannot pack weights")
HALF = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not can_pack(CPU, torch.bfloat16), reason="this processor has no packed product in bfloat16; see the fallback"
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "m")


def load(folder, dtype=torch.float32) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True, dtype=dtype)
    return unet.requires_grad_(False)


def accelerated(folder, switches, dtype=torch.float32) -> UNet2DConditionModel:
    unet = load(folder, dtype)
    accelerate(unet, Accel.parse(switches), CPU)
    return unet


def inputs(rows=2, seed=0, dtype=torch.float32):
    """Keywords of a UNet call."""
    generator = torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(rows, 24, generator=generator), "time_ids": torch.full((rows, 6), 512.0)}
    return {
        "sample": torch.randn(rows, 4, 16, 16, generator=generator).to(dtype),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": torch.randn(rows, 77, 40, generator=generator).to(dtype),
        "added_cond_kwargs": {name: tensor.to(dtype) for name, tensor in added.items()},
        "return_dict": False,
    }


@torch.inference_mode()
def answer(unet, **wanted):
    return unet(**inputs(**wanted))[0]


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def lora(folder, tmp_path) -> str:
    """A LoRA on every linear layer of the attention blocks."""
    torch.manual_seed(3)
    tensors = {}
    for name, module in load(folder).named_modules():
        if isinstance(module, nn.Linear) and ".attentions." in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features) * 0.3
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2) * 0.3
    save_file(tensors, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


def heads(rows, count, length, keys, width, dtype, seed=0):
    """Query, key and value as the projections lay them out: ``[N, heads, L, D]`` views of ``[N, L, heads, D]``."""
    torch.manual_seed(seed)
    return tuple(torch.randn(rows, n, count, width).to(dtype).transpose(1, 2) for n in (length, keys, keys))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, HALF_ROUNDING)])
@pytest.mark.parametrize("lengths", [(1024, 1024), (SCORES // 600 + 1, 600), (3, 513), (256, 77), (1, 1)])
@pytest.mark.parametrize("way", [in_blocks, by_rows])
def test_plain_products_attend_as_torch_does(way, dtype, most, lengths):
    """Whole blocks, a remainder of one, fewer queries than a block, and a prompt's keys, against float64."""
    query, key, value = heads(2, 3, *lengths, 32, dtype)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert relative(way(query, key, value), exact) <= most


@pytest.mark.parametrize("keys", [MANY_KEYS, 256, 77])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(keys):
    """Each row is computed by itself."""
    query, key, value = heads(4, 2, 700, keys, 32, torch.bfloat16)
    together = attend(query, key, value)
    for row in range(4):
        assert torch.equal(attend(query[row : row + 1], key[row : row + 1], value[row : row + 1])[0], together[row])


def test_plain_products_are_for_half_precision():
    """In float32 torch's own way is as fast or faster, and is what is used."""
    query, key, value = heads(1, 1, 8, MANY_KEYS, 32, torch.float32)
    assert suits(query.bfloat16())
    assert not suits(query)
    assert torch.equal(attend(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_attention_in_blocks_is_what_an_accelerated_unet_uses(folder, monkeypatch):
    """With few keys counted as many, every attention goes through blocks, and the answer is the plain one's."""
    plain = answer(load(folder, torch.bfloat16), dtype=torch.bfloat16)
    unet = accelerated(folder, "blocked_attention", torch.bfloat16)
    calls = []
    monkeypatch.setattr(blocked, "MANY_KEYS", 8)
    monkeypatch.setattr(blocked, "in_blocks", lambda *args: calls.append(1) or in_blocks(*args))
    given = answer(unet, dtype=torch.bfloat16)

    assert len(calls) == sum(isinstance(module, FusedAttention) for module in unet.modules())
    assert relative(given, plain) <= 2 * HALF_ROUNDING


@pytest.mark.parametrize("most", [0, blocked.MOST_WRITTEN])
@pytest.mark.parametrize("held", [2**8, 2**12, 2**20])
def test_attention_for_a_compiled_network_is_the_plain_one(most, held, monkeypatch):
    """Divided by rows, by queries, not at all, and as one operator; several batch and head counts."""
    monkeypatch.setattr(blocked, "SCORES", held)
    monkeypatch.setattr(blocked, "MOST_WRITTEN", most)
    for rows, count in ((1, 1), (3, 2)):
        query, key, value = heads(rows, count, 70, 33, 16, torch.bfloat16)
        exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        assert relative(blocked.attend_compiled(query, key, value), exact) <= HALF_ROUNDING
    query, key, value = heads(2, 2, 9, 33, 16, torch.float32)
    assert torch.equal(blocked.attend_compiled(query, key, value), F.scaled_dot_product_attention(query, key, value))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(5, 24), (2, 77, 24), (1, 1, 24)])
def test_a_packed_layer_gives_the_plain_layers_answer(dtype, shape):
    """With and without bias, for any number of leading dimensions, and for another number of rows than it was packed
    for."""
    torch.manual_seed(0)
    for bias in (True, False):
        network = nn.Sequential(nn.Linear(24, 40, bias=bias)).requires_grad_(False).to(dtype)
        plain = copy.deepcopy(network)
        assert pack_linears(network) == plain[0].weight.nbytes
        network(torch.randn(7, 24).to(dtype))
        given = torch.randn(shape).to(dtype)
        assert relative(network(given), plain(given)) <= (1e-6 if dtype == torch.float32 else HALF_ROUNDING)
        assert network[0].pack.packings == 1


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_packed_gate_is_the_gated_layer_and_not_farther_from_exact(dtype):
    """GELU and product happen before rounding; an edit of either half is seen, and of the bias, too."""
    most = 1e-5 if dtype == torch.float32 else HALF_ROUNDING
    torch.manual_seed(0)
    network = nn.Sequential(GEGLU(24, 40)).requires_grad_(False).to(dtype)
    plain = copy.deepcopy(network)
    assert pack_gates(network) == 1
    given = torch.randn(2, 7, 24).to(dtype)
    for edited, factor in ((slice(0), 1), (slice(40), 2), (slice(40, 80), -3)):
        for layer in (network[0].proj, plain[0].proj):
            layer.weight[edited] *= factor
            layer.bias[edited] += factor
        exact = copy.deepcopy(plain).double()(given.double())
        assert relative(network(given), exact) <= most
        assert relative(network(given), exact) <= max(1e-5, relative(plain(given), exact))


@needs_packing
def test_an_edited_weight_is_packed_anew_in_every_way_of_editing():
    """Whole, in part, as a product's target, through a detached view, moved, replaced; no edit leaves old numbers."""
    layer = nn.Sequential(nn.Linear(16, 16, bias=False)).requires_grad_(False)
    pack_linears(layer)
    given, ones = torch.eye(16), torch.ones(16, 16)

    def shows(expected) -> bool:
        return torch.equal(layer(given).T, expected)

    weight = layer[0].weight
    with torch.inference_mode():
        weight.detach().copy_(2 * ones)
        assert shows(2 * ones)
        weight.detach()[:8].copy_(3 * ones[:8])
        assert not shows(2 * ones) and shows(weight)
        torch.addmm(ones, ones[:, :2], ones[:2], out=weight.detach().view(16, -1))
        assert shows(3 * ones)
    layer.to(torch.bfloat16).to(torch.float32)
    layer[0].weight.data = 5 * ones
    assert shows(5 * ones)
    assert isinstance(layer[0], PackedLinear)


@pytest.mark.parametrize("switches", ["prepack", "keep_prompts", "auto", "prepack,keep_prompts,channels_last"])
def test_loras_go_on_and_off_and_every_bit_comes_back(folder, lora, switches):
    """With packed weights and kept prompts a LoRA acts at once, and so does its end."""
    unet, plain = accelerated(folder, switches), load(folder)
    before = answer(unet)
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    for scale in (1.0, -0.5, 1.0):
        with (
            adapters.active(adapters.resolve([LoraRef(lora, scale)])),
            reference.active(reference.resolve([LoraRef(lora, scale)])),
        ):
            exact = answer(plain)
            assert relative(answer(unet), exact) <= 1e-5
            assert relative(before, exact) > 1e-3
    adapters.restore()
    assert torch.equal(answer(unet), before)


def test_prompts_are_asked_once_for_all_steps_and_anew_when_they_change(folder):
    """Keys and values come from memory while prompts are equal, whatever tensor they come in, and from nowhere else."""
    unet, plain = accelerated(folder, "keep_prompts"), load(folder)
    asked = []
    for module in unet.modules():
        if isinstance(module, FusedAttention) and module.is_cross_attention:
            module._project = lambda tokens, own=module._project: asked.append(1) or own(tokens)
    layers = sum(isinstance(m, FusedAttention) and m.is_cross_attention for m in unet.modules())

    with torch.inference_mode():
        for step in (500, 400, 300):
            wanted = inputs() | {"timestep": torch.full((2,), step)}
            assert relative(unet(**wanted)[0], plain(**wanted)[0]) <= 1e-5
        assert len(asked) == layers
        other = inputs(seed=1)
        assert relative(unet(**other)[0], plain(**other)[0]) <= 1e-5
        assert len(asked) == 2 * layers
        other["encoder_hidden_states"].zero_()  # the same tensor, filled anew
        assert relative(unet(**other)[0], plain(**other)[0]) <= 1e-5
        assert relative(answer(unet, rows=3), answer(plain, rows=3)) <= 1e-5


def test_a_copy_keeps_nothing_of_the_original(folder, lora):
    """A deep copy answers for its own weights."""
    unet = accelerated(folder, "prepack,keep_prompts")
    plain = answer(unet)
    twin = copy.deepcopy(unet)
    adapters = Adapters({"unet": unet})
    with adapters.active(adapters.resolve([LoraRef(lora)])):
        assert relative(answer(twin), plain) <= 1e-6
        assert relative(answer(unet), plain) > 1e-3


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_vae_gives_the_same_picture_with_channels_last(folder, dtype, most):
    """What ``auto`` does to a VAE on a CPU differs by rounding alone."""
    plain, fast = (
        AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, dtype=dtype).requires_grad_(False)
        for _ in range(2)
    )
    accelerate_vae(fast, Accel(auto=True), CPU)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        assert relative(fast.decode(latents).sample, plain.decode(latents).sample) <= most
    assert fast.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_stay_innermost_all_the_way_through(folder, dtype):
    """Every transformer gives its picture as it got it, without a copy, and the answer is the plain one's."""
    unet = accelerated(folder, "channels_last", dtype)
    orders = []
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            assert type(module) is InnermostTransformer
            module.register_forward_hook(
                lambda _, __, made: orders.append(made[0].is_contiguous(memory_format=torch.channels_last))
            )
    given = answer(unet, dtype=dtype)
    assert orders and all(orders)
    assert relative(given, answer(load(folder, dtype), dtype=dtype)) <= (1e-5 if dtype == torch.float32 else 0.02)


def test_auto_is_what_was_measured_to_pay_on_a_device():
    """Nothing that has to warm up, and blocks in half precision alone."""
    full, half, gpu = (
        suited(Accel(auto=True), torch.device(device), dtype)
        for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16))
    )
    assert full.vae_channels_last and full.keep_prompts and full.channels_last and not full.blocked_attention
    assert half.blocked_attention
    assert gpu.fuse_projections and gpu.channels_last and not gpu.prepack
    for accel in (full, half, gpu):
        assert not accel.compile and not accel.cuda_graphs and not accel.static_shapes


def test_without_room_weights_are_not_packed_and_the_log_says_so(folder, monkeypatch, caplog):
    """Packed copies take as much memory again; a service that has none stays up."""
    monkeypatch.setattr(switchboard, "free_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING):
        unet = accelerated(folder, "prepack")
    assert "prepack is off" in caplog.text
    assert not any(isinstance(module, PackedLinear | PackedGeglu) for module in unet.modules())
    assert relative(answer(unet), answer(load(folder))) <= 1e-5


def test_ways_for_cpus_are_left_out_of_compiled_networks(folder, monkeypatch, caplog):
    """They hold Python state that a compiler would freeze."""
    monkeypatch.setattr(switchboard, "_can_compile", lambda device: False)
    with caplog.at_level(logging.WARNING):
        unet = accelerated(folder, "prepack,keep_prompts,compile")
    assert "keep_prompts, prepack: off, the network is compiled" in caplog.text
    assert not any(isinstance(module, PackedLinear | FusedAttention) for module in unet.modules())


def test_auto_goes_with_compiling(monkeypatch, folder, caplog):
    """It then names what a compiled network can have, and nothing has to be left out."""
    monkeypatch.setattr(switchboard, "_can_compile", lambda device: False)
    with caplog.at_level(logging.WARNING):
        unet = accelerated(folder, "auto,static_shapes", torch.bfloat16)
    assert not caplog.text
    ways = {module.attend for module in unet.modules() if isinstance(module, FusedAttention)}
    kernel = native.can_multiply() and native.kernel() is not None
    assert ways == {(native if kernel else blocked).attend_compiled}
    assert not any(isinstance(module, PackedLinear) for module in unet.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_whole_network_is_traced_as_one_graph_for_each_shape_and_follows_loras(folder, lora, monkeypatch):
    """Traced by torch's compiler, with its slow back end left out; LoRAs act without a new trace."""
    graphs = []

    def back_end(module, example_inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(switchboard, "BACKEND", back_end)
    unet, plain = load(folder), load(folder)
    compile_whole(unet)
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    for scale in (0.0, 1.0, -0.5):
        with (
            adapters.active(adapters.resolve([LoraRef(lora, scale)])),
            reference.active(reference.resolve([LoraRef(lora, scale)])),
        ):
            assert relative(answer(unet), answer(plain)) <= 1e-5
    assert len(graphs) == 1
    assert relative(answer(unet, rows=1), answer(plain, rows=1)) <= 1e-5
    assert len(graphs) == 2


def test_a_pack_that_cannot_be_had_is_no_error(monkeypatch):
    """A torch without the operators runs the plain way."""

    def fails(*_):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(Pack, "linear", fails)
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepack_asked_for_by_name_stays_off_where_it_cannot_be_had(folder, dtype, monkeypatch, caplog):
    """A processor without packed products in a precision draws with the plain ones, and the log says why."""

    def fails(*_, **__):
        raise RuntimeError("bf16 path needs the cpu support")

    monkeypatch.setattr(Pack, "linear", fails)
    with caplog.at_level(logging.WARNING):
        unet = accelerated(folder, "prepack", dtype)
    assert not any(isinstance(module, PackedLinear) for module in unet.modules())
    assert f"prepack is off: there is no product with packed weights in {dtype}" in caplog.text
    plain = answer(load(folder, dtype), dtype=dtype)
    assert relative(answer(unet, dtype=dtype), plain) <= (1e-5 if dtype == torch.float32 else HALF_ROUNDING)
