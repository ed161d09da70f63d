"""How a file was trained, as its trainer notes it: followed for the strength, refused if it is another formula."""

import json

import pytest
import torch
from safetensors.torch import save, save_file

from impasto.errors import LoraError
from impasto.lora.formats import read_lora
from impasto.lora.keys import Target, TargetNames

MODULE = "mid_block.attentions.0.proj_in"
PLACE = Target("unet", MODULE)
MODEL = TargetNames({PLACE: (8, 6)})
FLAT = "lora_unet_" + MODULE.replace(".", "_")


def delta(folder, tensors, metadata) -> torch.Tensor:
    """What the file adds to a weight of ones at strength 1."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "a.safetensors", metadata)
    weight = torch.ones(8, 6)
    return read_lora(folder / "a.safetensors", MODEL).patches[PLACE].patched(weight, 1.0) - weight


def by_root(algorithm: str, value: object = "True") -> dict[str, str]:
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": algorithm, "rs_lora": value}),
    }


def test_the_root_of_the_rank_counts_for_a_whole_lokr(tmp_path):
    """LyCORIS trains whole factors at the root of the rank then, and saves the rank times that root as alpha."""
    small, large = torch.randn(2, 3), torch.randn(4, 2)
    tensors = {f"{FLAT}.lokr_w1": small, f"{FLAT}.lokr_w2": large, f"{FLAT}.alpha": torch.tensor(8.0)}  # rank 4
    kron = torch.kron(small, large)
    torch.testing.assert_close(delta(tmp_path, tensors, by_root("lokr")), 2 * kron)
    torch.testing.assert_close(delta(tmp_path, tensors, by_root("lokr", "False")), kron)
    torch.testing.assert_close(delta(tmp_path, tensors, {"ss_network_args": "no JSON"}), kron)


def test_the_root_of_the_rank_counts_for_glora(tmp_path):
    """Of LyCORIS' kinds GLoRA alone saves its alpha as it was given, so the root has to be taken here."""
    a1, a2, b1, b2 = torch.randn(6, 4), torch.randn(4, 6), torch.randn(8, 4), torch.randn(4, 6)
    parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    tensors = {f"{FLAT}.{part}.weight": tensor for part, tensor in parts.items()} | {f"{FLAT}.alpha": torch.tensor(3.0)}
    whole = torch.ones(8, 6) @ a1 @ a2 + b1 @ b2
    torch.testing.assert_close(delta(tmp_path, tensors, by_root("glora")), 3 / 2 * whole)
    torch.testing.assert_close(delta(tmp_path, tensors, None), 3 / 4 * whole)


def test_the_root_of_the_rank_is_in_a_loras_alpha_already(tmp_path):
    """LyCORIS' other kinds save an alpha with which alpha over rank is right, so nothing more is done to them."""
    down, up = torch.randn(4, 6), torch.randn(8, 4)
    tensors = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.tensor(6.0)}
    torch.testing.assert_close(delta(tmp_path, tensors, by_root("lora")), 1.5 * up @ down)


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa', which changed the model's own weights.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config, which is not read"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ],
)
def test_what_is_more_than_two_matrices_is_refused(tmp_path, config, phrase):
    """PEFT's ways to train that change the model, or add to the formula, are no plain LoRA; it says what to do."""
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(4, 6), f"unet.{MODULE}.lora_B.weight": torch.ones(8, 4)}
    written = {f"unet.{key}": value for key, value in ({"r": 4, "lora_alpha": 4} | config).items()}
    with pytest.raises(LoraError, match=phrase):
        delta(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(written)})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_model_alone_are_followed(tmp_path, start):
    """Where only the adapter began in another way, the file is a plain LoRA."""
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(4, 6), f"unet.{MODULE}.lora_B.weight": torch.ones(8, 4)}
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.init_lora_weights": start, "unet.kasa_config": None}
    added = delta(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    torch.testing.assert_close(added, torch.full((8, 6), 2.0))


def test_peft_says_which_side_its_ia3_scales(tmp_path):
    """A convolution's factor has one shape for both sides, so with as many inputs as outputs its list decides."""
    model = TargetNames({PLACE: (4, 4, 3, 3)})
    factor = torch.rand(1, 4, 1, 1)
    (tmp_path / "adapter_model.safetensors").write_bytes(save({f"base_model.model.{MODULE}.ia3_l": factor}))
    weight = torch.randn(4, 4, 3, 3)
    for listed, scaled in ((["proj_in"], weight * factor), ([], weight * factor.mT.reshape(4, 1, 1, 1))):
        config = {"peft_type": "IA3", "feedforward_modules": listed}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        patch = read_lora(tmp_path / "adapter_model.safetensors", model).patches[PLACE]
        torch.testing.assert_close(patch.patched(weight, 1.0), scaled)


def test_constrained_oft_turns_no_further_than_it_was_let(tmp_path):
    """PEFT shrinks each block's norm to eps over the root of their number before every use, not before it saves."""
    upper = torch.tensor([[3.0], [1e-4], [0.0]])
    metadata = {"peft_type": "OFT", "coft": True, "eps": 0.01, "use_cayley_neumann": False}
    added = delta(tmp_path, {f"unet.{MODULE}.oft_R.weight": upper}, {"lora_adapter_metadata": json.dumps(metadata)})
    skew = torch.zeros(3, 2, 2)
    skew[0, 0, 1], skew[1, 0, 1] = 0.01 / 3**0.5 / 2**0.5, 1e-4
    skew = skew - skew.mT
    identity = torch.eye(2)
    turn = (identity - skew) @ torch.linalg.inv(identity + skew)
    expected = torch.einsum("onk,nck->onc", torch.ones(8, 3, 2), turn).reshape(8, 6) - 1
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-4)
