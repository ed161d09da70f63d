"""Checkers that do not come with us: by their own formulas on random weights, whole or refused, here or from a hub."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, ViTConfig, ViTForImageClassification, pipeline

from impasto.errors import ConfigError
from impasto.models.hub import fetch_model
from impasto.safety.compvis import OLD_PREFIX, CompVisChecker
from impasto.safety.table import make_checker
from impasto.safety.weights import FILES, WEIGHTS, find_weights
from tests import harmless
from tests.hub_server import Repository, folder_files, running_hub

SIDE = 32  # pixels the tiny networks look at
PICTURES = list(harmless.pictures().values())
PREPROCESSOR = {
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
LEVELS = ("neutral", "low", "medium", "high")


def save_classifier(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    """A ViT of random weights with these labels, as Falconsai's and Freepik's repositories are laid out."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=8,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}, initializer_range=0.5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = PREPROCESSOR | {"image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_compvis(folder: Path) -> Path:
    """The CompVis network of random weights, with thresholds in the middle of what it sees, as its file names them."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=vision | {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.5}, projection_dim=16
    )
    network = StableDiffusionSafetyChecker(config)
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(network, name).data.normal_()
    network.visual_projection.weight.data.normal_()
    network.concept_embeds_weights.data.fill_(0.395)
    network.special_care_embeds_weights.data.fill_(0.13)
    network.save_pretrained(folder)
    weights = {key.replace("vision_model.", OLD_PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
    positions = {f"{OLD_PREFIX}embeddings.position_ids": torch.arange(17)[None]}
    save_file(weights | positions, folder / WEIGHTS)
    processor = PREPROCESSOR | {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("levels"), LEVELS)


@pytest.fixture(scope="module")
def compvis(tmp_path_factory):
    return save_compvis(tmp_path_factory.mktemp("compvis"))


def test_a_classifier_says_what_its_pipeline_says(classifier):
    """Each label's probability within 1e-6 of transformers' own pipeline, for every picture."""
    verdicts = make_checker(f"hf:{classifier}", device="cpu").check(PICTURES)
    reference = pipeline("image-classification", str(classifier), device="cpu", top_k=None)
    for verdict, answer in zip(verdicts, reference(PICTURES), strict=True):
        assert dict(verdict.categories) == pytest.approx({row["label"]: row["score"] for row in answer}, abs=1e-6)
        assert verdict.score == verdict.categories["nsfw"]
        assert verdict.flagged is (verdict.score >= 0.5)
    assert len({verdict.flagged for verdict in verdicts}) == 2, "the random network flags some and not others"


def test_of_a_scale_the_upper_levels_count_unless_others_are_named(levels):
    """Medium and high by default; what stands after the # otherwise, whose probabilities are added up."""
    whole = make_checker(f"hf:{levels}", device="cpu").check(PICTURES)
    strict = make_checker(f"hf:{levels}#Low+medium+high", device="cpu").check(PICTURES)
    for left, right in zip(whole, strict, strict=True):
        assert left.score == pytest.approx(left.categories["medium"] + left.categories["high"], abs=1e-6)
        assert right.score == pytest.approx(1 - right.categories["neutral"], abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "asked", "phrase"),
    [(("a", "b"), "", "which labels count"), (("normal", "nsfw"), "#porn", "no label porn; there are: normal, nsfw")],
)
def test_labels_that_do_not_tell_what_counts_stop_start_up(tmp_path, labels, asked, phrase):
    """A classifier of cats and dogs is no safety checker, and a misspelt label would never be seen."""
    with pytest.raises(ConfigError, match=phrase):
        make_checker(f"hf:{save_classifier(tmp_path / 'm', labels)}{asked}", device="cpu")


def test_compvis_decides_as_its_published_code(compvis):
    """The same pictures are flagged as by diffusers' own class, from a file that names its weights as published."""
    checker = make_checker(f"compvis:{compvis}", device="cpu")
    verdicts = checker.check(PICTURES)
    pixels = checker._processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    _, flagged = checker._network(pixels, [torch.zeros(1) for _ in PICTURES])
    assert [verdict.flagged for verdict in verdicts] == [bool(flag) for flag in flagged]
    assert {True, False} == set(flagged)


def test_special_care_lowers_the_other_thresholds(compvis, tmp_path):
    """By 0.01 where such a concept is seen, as published; not where none is."""
    verdicts = CompVisChecker(find_weights(str(compvis))).check(PICTURES)
    careless = shutil.copytree(compvis, tmp_path / "careless")
    weights = load_file(careless / WEIGHTS)
    weights["special_care_embeds_weights"].fill_(2.0)  # no cosine gets there
    save_file(weights, careless / WEIGHTS)
    others = CompVisChecker(find_weights(str(careless))).check(PICTURES)
    gaps = {round(verdict.score - other.score, 3) for verdict, other in zip(verdicts, others, strict=True)}
    assert gaps == {0.0, 0.01}


@pytest.mark.parametrize("kind", ["hf", "compvis"])
@pytest.mark.parametrize(("threshold", "flagged"), [(0.0, True), (1.01, False)])
def test_thresholds_are_by_kind(classifier, compvis, kind, threshold, flagged):
    """At 0 all are flagged, above 1 none; another kind's threshold changes nothing."""
    folder = {"hf": classifier, "compvis": compvis}[kind]
    checker = make_checker(f"{kind}:{folder}", {kind: threshold, "builtin": 1 - threshold}, "cpu")
    assert {verdict.flagged for verdict in checker.check(PICTURES)} == {flagged}


@pytest.mark.parametrize("kind", ["hf", "compvis"])
@pytest.mark.parametrize("missing", FILES)
def test_a_folder_without_a_file_is_refused(classifier, compvis, tmp_path, kind, missing):
    """Named, and before a network is made; pickles beside it do not count."""
    folder = shutil.copytree({"hf": classifier, "compvis": compvis}[kind], tmp_path / "m")
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match=missing):
        make_checker(f"{kind}:{folder}", device="cpu")


@pytest.mark.parametrize("damage", ["a missing weight", "cut off", "a picture", "of the other kind"])
@pytest.mark.parametrize("kind", ["hf", "compvis"])
def test_wrong_weights_are_refused(classifier, compvis, tmp_path, kind, damage):
    """A network with random numbers in it would say anything: not whole is not loaded."""
    own, other = (classifier, compvis) if kind == "hf" else (compvis, classifier)
    folder = shutil.copytree(own, tmp_path / "m")
    file = folder / WEIGHTS
    match damage:
        case "a missing weight":
            weights = load_file(file)
            weights.pop(next(key for key in sorted(weights) if key.endswith("k_proj.weight") or "key.weight" in key))
            save_file(weights, file, {"format": "pt"})
        case "cut off":
            file.write_bytes(file.read_bytes()[:-100])
        case "a picture":
            Image.new("RGB", (9, 9)).save(file, "PNG")
        case _:
            shutil.copy(other / WEIGHTS, file)
    with pytest.raises(ConfigError, match="safety_checker"):
        make_checker(f"{kind}:{folder}", device="cpu")


@pytest.mark.parametrize(
    "text", ["", "buildin", "builtin:x", "hf:", "compvis", "compvis:x#nsfw", "builtin,none", "hf:/nowhere/at/all"]
)
def test_what_is_no_checker_is_refused(text):
    """The message names the setting."""
    with pytest.raises(ConfigError, match="safety_checker"):
        make_checker(text, device="cpu")


def test_a_device_that_is_not_there_is_refused(classifier):
    """By the name of its setting."""
    with pytest.raises(ConfigError, match="safety_device"):
        make_checker(f"hf:{classifier}", device="cuda:99")


def test_none_is_no_checker():
    """And nothing is loaded for it."""
    assert make_checker("none") is None


def test_several_are_combined(classifier):
    """In the order that they are named in."""
    checker = make_checker(f"builtin, hf:{classifier}", device="cpu")
    assert checker.name == "builtin,hf"
    assert len(checker.check(PICTURES[:2])) == 2


def test_a_checker_comes_from_the_hub_at_one_commit(classifier, tmp_path):
    """The three files and nothing else; with the hub away, that commit is used as it is here."""
    with running_hub() as hub:
        files = folder_files(classifier) | {"pytorch_model.bin": b"\x80", "README.md": b"words"}
        hub.repositories["owner/checker"] = Repository(files)
        fetch = partial(fetch_model, endpoint=hub.url, cache_dir=tmp_path / "cache")
        checker = make_checker("hf:owner/checker", device="cpu", fetch=fetch)
        assert hub.fetched() == set(FILES)
        named = f"owner/checker@{hub.repositories['owner/checker'].commit}"
        assert checker.version.startswith(named)
        local = make_checker(f"hf:{classifier}", device="cpu").check(PICTURES)
        assert [v.score for v in checker.check(PICTURES)] == [v.score for v in local]
        with pytest.raises(ConfigError, match=r"safety_checker.*owner/other"):
            make_checker("hf:owner/other", device="cpu", fetch=fetch)
    assert make_checker(f"hf:{named}", device="cpu", fetch=fetch).version == checker.version
