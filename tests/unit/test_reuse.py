"""Parts of the UNet and VAE run on their own: reused features, tiles, and a float32 retry that saves the picture."""

import logging
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from impasto.errors import ModelError
from impasto.models.reuse import predict_full, predict_shallow
from impasto.models.tiling import VALUES_PER_PIXEL, decode, encode, fits
from tests.random_sdxl import save_random_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")


BUILTIN = "src/impasto/models/builtin"
DOWN, UP = "DownBlock2D", "UpBlock2D"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
LAYOUTS = {
    "base": ((DOWN, CROSS_DOWN, CROSS_DOWN), (CROSS_UP, CROSS_UP, UP)),
    "refiner": ((DOWN, CROSS_DOWN, CROSS_DOWN, DOWN), (UP, CROSS_UP, CROSS_UP, UP)),
    "attention outside": ((CROSS_DOWN, CROSS_DOWN, DOWN), (UP, CROSS_UP, CROSS_UP)),
}


def tiny(layout: str) -> UNet2DConditionModel:
    """A UNet of SDXL's kind with random weights."""
    down, up = LAYOUTS[layout]
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            block_out_channels=(8, 16, 16, 16)[: len(down)],
            down_block_types=down,
            up_block_types=up,
            transformer_layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            cross_attention_dim=40,
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> dict[str, UNet2DConditionModel]:
    """Every kind of UNet that must work, by name."""
    folder = save_random_sdxl(tmp_path_factory.mktemp("models") / "m")
    stored = {"random": folder, "built-in": BUILTIN}
    loaded = {
        name: UNet2DConditionModel.from_pretrained(f"{path}/unet", local_files_only=True).requires_grad_(False)
        for name, path in stored.items()
    }
    return {name: tiny(name) for name in LAYOUTS} | loaded


KINDS = [*LAYOUTS, "random", "built-in"]


def inputs(unet, seed=0, rows=2, side=16, timestep=500, dtype=torch.float32):
    """Random inputs ``sample, timesteps, tokens, added_cond`` of a UNet."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return (
        torch.randn(rows, 4, side, side + 4, generator=generator).to(dtype),
        torch.tensor([timestep + 7 * row for row in range(rows)]),
        torch.randn(rows, 9, config.cross_attention_dim, generator=generator).to(dtype),
        {
            "text_embeds": torch.randn(rows, pooled, generator=generator).to(dtype),
            "time_ids": torch.randint(0, 99, (rows, 6), generator=generator).to(dtype),
        },
    )


def whole(unet, sample, timesteps, tokens, added):
    """What diffusers' own call gives."""
    return unet(sample, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]


def relative(a, b) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [16, 17])
def test_taking_the_features_along_changes_nothing(unets, kind, side):
    """``predict_full`` gives what the UNet gives, bit for bit, and leaves no hook behind; odd sizes too."""
    unet = unets[kind]
    given = inputs(unet, side=side)

    output, features = predict_full(unet, *given)

    assert torch.equal(output, whole(unet, *given))
    assert features.shape[0] == 2 and features.shape[-2:] == given[0].shape[-2:]
    assert not unet.up_blocks[-1]._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [16, 17])
def test_a_shallow_call_with_its_own_features_is_the_full_call(unets, kind, side):
    """The outer ring around the features of the same inputs gives the whole network's answer."""
    unet = unets[kind]
    given = inputs(unet, side=side)
    output, features = predict_full(unet, *given)

    assert relative(predict_shallow(unet, *given, features), output) <= 1e-5


def test_a_shallow_call_keeps_half_precision(unets):
    """Nothing is silently computed in another format."""
    unet = tiny("base").to(torch.bfloat16)
    given = inputs(unet, dtype=torch.bfloat16)

    output, features = predict_full(unet, *given)

    assert output.dtype == features.dtype == torch.bfloat16
    assert predict_shallow(unet, *given, features).dtype == torch.bfloat16


def test_features_of_the_step_before_come_close(unets):
    """On the built-in model, a step's features serve the next step: not exact, but far closer than its old answer."""
    unet = unets["built-in"]
    sample, _, tokens, added = inputs(unet, side=24)
    now, later = (torch.tensor([t, t]) for t in (500, 480))
    before, features = predict_full(unet, sample, now, tokens, added)
    moved = sample + 0.02 * before
    exact = whole(unet, moved, later, tokens, added)

    reused = predict_shallow(unet, moved, later, tokens, added, features)

    assert 1e-6 < relative(reused, exact) < 0.05
    foreign = predict_full(unet, *inputs(unet, seed=5, side=24))[1]
    assert relative(predict_shallow(unet, moved, later, tokens, added, foreign), exact) > 2 * relative(reused, exact)


def small_vae(**changes) -> AutoencoderKL:
    """A VAE with random weights that shrinks 8 times; its own tiles are 64 pixels."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (4, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**settings | changes).eval().requires_grad_(False)


def latents(side=12) -> torch.Tensor:
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))


def test_without_tiles_the_vae_is_called_as_it_is():
    """Decoding and encoding are diffusers' own, even when the VAE was left with tiling on."""
    vae, z = small_vae(), latents()
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    picture, found = vae.decode(z).sample, vae.encode(x).latent_dist
    vae.enable_tiling()

    assert torch.equal(decode(vae, z, tiling=False), picture)
    mean, deviation = encode(vae, x, tiling=False)
    assert torch.equal(mean, found.mean)
    torch.testing.assert_close(deviation, found.std)


def test_tiles_are_diffusers_tiles():
    """With tiling the answer is that of ``enable_tiling``, another one than without, of the same size."""
    vae, reference, z = small_vae(), small_vae(), latents()
    reference.enable_tiling()
    x = torch.rand(1, 3, 96, 96) * 2 - 1

    picture = decode(vae, z, tiling=True)

    assert torch.equal(picture, reference.decode(z).sample)
    assert not torch.equal(picture, decode(vae, z, tiling=False))
    assert torch.equal(encode(vae, x, tiling=True)[0], reference.encode(x).latent_dist.mean)


def test_large_tiles_are_cut_down():
    """SDXL's VAE would take 1024 pixels for one tile, which saves nothing where a 1024-pixel picture does not fit."""
    vae, z = small_vae(sample_size=1024), latents(80)
    reference = small_vae(sample_size=512)
    reference.enable_tiling()

    assert torch.equal(decode(vae, z, tiling=True), reference.decode(z).sample)


@pytest.mark.parametrize("tiling", [True, False])
def test_the_vae_is_left_as_it_was(tiling):
    """Whatever happens inside: tiling, tile sizes and number format are the caller's."""
    vae = small_vae(sample_size=1024).to(torch.bfloat16)
    vae.use_tiling = not tiling
    before = (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.dtype)
    decode(vae, latents(), tiling=tiling)
    with pytest.raises(RuntimeError):
        decode(vae, torch.zeros(1, 5, 8, 8), tiling=tiling)

    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.dtype) == before


def overflowing(part: str) -> AutoencoderKL:
    """A VAE whose activations pass float16's 65,504 on the way through, as SDXL's own do."""
    vae = small_vae()
    getattr(vae, part).conv_in.weight.mul_(3e5)  # the weights themselves stay below
    return vae


@pytest.mark.parametrize("tiling", [True, False])
def test_a_picture_that_overflows_float16_is_decoded_in_float32(tiling, caplog):
    """The black picture of the field: the half-precision result is not finite, what is delivered is float32's."""
    vae, z = overflowing("decoder").to(torch.float16), latents()
    exact = decode(overflowing("decoder").to(torch.float16).float(), z, tiling=tiling)
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    assert not vae.decode(z.half()).sample.isfinite().all()

    with caplog.at_level(logging.WARNING):
        picture = decode(vae, z, tiling=tiling)

    assert picture.dtype == torch.float32 and torch.equal(picture, exact)
    assert "float32" in caplog.text
    assert vae.dtype == torch.float16
    assert all(torch.equal(weights[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_start_picture_that_overflows_float16_is_encoded_in_float32():
    """Likewise on the way in."""
    vae = overflowing("encoder").to(torch.float16)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert not vae.encode(x.half()).latent_dist.parameters.isfinite().all()

    mean, deviation = encode(vae, x, tiling=False)

    assert mean.isfinite().all() and deviation.isfinite().all()


def test_what_is_not_finite_in_float32_either_is_an_error():
    """No NaN picture is ever delivered."""
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ModelError, match="not finite"):
            decode(small_vae().to(dtype), latents() * float("nan"), tiling=False)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return result

    def _drop(self, key, size):
        self._seen.discard(key)
        self.now -= size


def test_the_rule_of_fits_covers_what_sdxls_vae_holds():
    """Its decoder, without weights, counted at 512 pixels: at least 1.5 times as much is asked for, at most 3 times."""
    with torch.device("meta"):
        vae = small_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
        with torch.no_grad(), Live() as live:
            vae.decode(torch.empty(1, 4, 64, 64))
    counted = live.peak / 512**2 / 4
    assert 1.5 * counted < VALUES_PER_PIXEL < 3 * counted


def test_fits_asks_for_its_share_of_the_free_memory():
    """A megapixel needs about 7 GB in float32 and half as much in float16, of nine tenths of what is free."""
    megapixel, gib = 1024 * 1024, 2**30
    assert fits(megapixel, torch.float32, 8 * gib) and not fits(megapixel, torch.float32, 7 * gib)
    assert fits(megapixel, torch.float16, 4 * gib) and not fits(megapixel, torch.float16, 3 * gib)
    assert not fits(1, torch.float32, 0)
