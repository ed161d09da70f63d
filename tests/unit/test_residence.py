"""Which networks are on the device: recorded by networks that note where they are sent."""

import pytest
import torch
from torch import nn

from impasto.models.residence import HOME, Residence

DEVICE = torch.device("meta")  # stands for a GPU: a place that is not home
DEVICES = {"text": DEVICE, "unet": DEVICE, "vae": DEVICE}


class Network(nn.Module):
    """Notes where it is sent."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def to(self, device):
        self.log.append((self.name, device.type))
        return self


@pytest.fixture
def log() -> list[tuple[str, str]]:
    return []


def test_without_off_loading_everything_settles_on_the_device(log):
    """And nothing moves afterwards."""
    residence, unet = Residence(DEVICES), Network("unet", log)
    residence.settle("unet", unet)
    with residence.using("unet", unet):
        pass
    assert log == [("unet", "meta")]


def test_encoders_come_for_a_prompt_and_go_home(log):
    """The other networks stay on the device."""
    residence = Residence(DEVICES, "encoders")
    unet, first, second = Network("unet", log), Network("first", log), Network("second", log)
    residence.settle("unet", unet)
    residence.settle("text", first, second)
    assert log == [("unet", "meta"), ("first", "cpu"), ("second", "cpu")]
    log.clear()
    with residence.using("text", first, second):
        assert log == [("first", "meta"), ("second", "meta")]
    assert log[2:] == [("first", "cpu"), ("second", "cpu")]


def test_each_role_has_a_device_of_its_own(log):
    """Text encoders on the CPU beside a UNet on the GPU."""
    residence, encoder, unet = Residence(DEVICES | {"text": HOME}), Network("encoder", log), Network("unet", log)
    residence.settle("text", encoder)
    residence.settle("unet", unet)
    assert log == [("encoder", "cpu"), ("unet", "meta")]


def test_one_network_at_a_time(log):
    """The one before goes home first, and one that is used again stays."""
    residence = Residence(DEVICES, "all")
    unet, vae = Network("unet", log), Network("vae", log)
    for role, network in (("unet", unet), ("unet", unet), ("vae", vae), ("unet", unet)):
        with residence.using(role, network):
            pass
    assert log == [("unet", "meta"), ("unet", HOME.type), ("vae", "meta"), ("vae", HOME.type), ("unet", "meta")]


def test_an_error_while_encoding_sends_the_encoders_home(log):
    """Nothing stays behind."""
    residence, encoder = Residence(DEVICES, "encoders"), Network("encoder", log)
    with pytest.raises(RuntimeError), residence.using("text", encoder):
        raise RuntimeError
    assert log[-1] == ("encoder", "cpu")
