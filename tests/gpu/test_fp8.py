"""float8 on CUDA: the product of the rounded numbers, LoRAs exact beside it, compiled and in recorded graphs too."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from impasto.engine.accel import Accel, accelerate
from impasto.lora.apply import Adapters
from impasto.models.fp8 import Fp8Linear, can_multiply, scaled_product, to_float8
from impasto.types import LoraRef
from tests.random_sdxl import base_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="needs compute capability 8.9 or newer",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
CUDA = torch.device("cuda")


def error(got, exact) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(
    ("count", "out", "inside"), [(4096, 640, 640), (1024, 10240, 1280), (77, 1280, 2048), (1, 32, 16)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_numbers(count, out, inside, bias):
    """SDXL's shapes and odd numbers of rows; fast sums cost less than the rounding to bfloat16 and float8."""
    assert can_multiply(CUDA, torch.bfloat16)
    inputs, weight = (torch.randn(n, inside, device=CUDA).bfloat16() for n in (count, out))
    added = torch.randn(out, device=CUDA).bfloat16() if bias else None
    values, scales = to_float8(inputs)
    rounded, weight_scales = to_float8(weight)
    got = scaled_product(inputs, rounded, weight_scales.t(), added)
    exact = (values.double() * scales) @ (rounded.double() * weight_scales).T + (added.double() if bias else 0)
    assert error(got, exact) < 0.01
    assert error(got, inputs.double() @ weight.double().T + (added.double() if bias else 0)) < 0.05


@pytest.fixture
def unets():
    """Two equal UNets in bfloat16: one to accelerate, one to compare with."""
    torch.manual_seed(0)
    plain = base_unet(4).requires_grad_(False).to(CUDA, torch.bfloat16).eval()
    return copy.deepcopy(plain), plain


def write_lora(path, unet, rank, seed) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".attentions." in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.2
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.2
    save_file(tensors, path)
    return str(path)


@torch.inference_mode()
def answer(unet, side=16):
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(2, 24, generator=generator), "time_ids": torch.full((2, 6), 512.0)}
    return unet(
        torch.randn(2, 4, side, side, generator=generator).to(CUDA, torch.bfloat16),
        torch.full((2,), 500, device=CUDA),
        encoder_hidden_states=torch.randn(2, 77, 40, generator=generator).to(CUDA, torch.bfloat16),
        added_cond_kwargs={name: tensor.to(CUDA, torch.bfloat16) for name, tensor in added.items()},
        return_dict=False,
    )[0].clone()


@pytest.mark.parametrize(
    "switches", ["fp8", "fp8,cuda_graphs", "fp8,compile", "fp8,static_shapes", "fp8,static_shapes,cuda_graphs"]
)
def test_loras_go_on_and_off_under_compiled_code_and_graphs(unets, tmp_path, switches):
    """Every set's answer is near the plain UNet's with that set, also after ranks grew; then the bare one is back."""
    unet, plain = unets
    files = [write_lora(tmp_path / f"{rank}.safetensors", plain, rank, rank) for rank in (4, 16, 24)]
    accelerate(unet, Accel.parse(switches), CUDA)
    assert any(isinstance(module, Fp8Linear) for module in unet.modules())
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    bare = answer(unet)
    assert error(bare, answer(plain)) < 0.1
    for picked in [(0,), (1,), (0, 1), (2,), (0,), (1,)]:
        refs = [LoraRef(files[index]) for index in picked]
        with adapters.active(adapters.resolve(refs)), reference.active(reference.resolve(refs)):
            exact = answer(plain)
            assert error(answer(unet), exact) < 0.1
            assert error(bare, exact) > 0.2  # the LoRA does something
    adapters.restore()
    assert error(answer(unet), bare) < 1e-2
