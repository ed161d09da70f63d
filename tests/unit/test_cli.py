"""The command line: help that teaches, keys on standard output, errors in one line, pictures in files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from impasto.cli import app
from impasto.config import GenerateSettings, Settings
from impasto.engine.accel import Accel
from impasto.types import EmbeddingRef, GenerationRequest, ImageReady
from tests.random_sdxl import save_random_sdxl

IMPASTO = Path(sys.executable).with_name("impasto")
FOX = next(Path(__file__).parents[2].glob("docs/gallery/*.[pjw]*g*"))
PYTHON_FILE = __file__


def impasto(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run the command as a user does, wide enough that help lines do not wrap."""
    return subprocess.run(
        [IMPASTO, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("serve",),
        ("worker",),
        ("generate",),
        ("keys",),
        ("keys", "create"),
        ("keys", "limit"),
        ("animate",),
        ("comfyui",),
        ("comfyui", "install"),
        ("db",),
        ("db", "backup"),
        ("status",),
    ],
)
def test_every_command_has_help(command):
    """``--help`` works everywhere and says something."""
    run = impasto(*command, "--help")
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("command", "kind", "names"),
    [
        (
            "serve",
            Settings,
            ["host", "port", "data_dir", "model", "device", "dtype", "refiner", "accel", "public_url", "log_level"],
        ),
        ("worker", Settings, ["data_dir", "model", "device", "dtype", "refiner", "accel", "log_level"]),
        ("generate", GenerateSettings, [name for name in GenerateSettings.model_fields if name != "max_batch"]),
    ],
)
def test_help_names_the_variable_and_the_default_of_each_option(command, kind, names):
    """What the help says comes from the settings themselves."""
    shown = impasto(command, "--help").stdout
    for name in names:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"IMPASTO_{name.upper()}" in shown
        default = kind.model_fields[name].default
        assert default in (None, [], "", False) or f"Default: {default}" in shown


def test_keys_are_created_listed_and_revoked(tmp_path):
    """The key stands alone on standard output, once; the list shows its first characters only."""
    created = impasto("keys", "create", "phone", "--data-dir", tmp_path)
    key = created.stdout.strip()
    assert len(key) == 64
    assert created.stdout == key + "\n"
    listed = impasto("keys", "list", IMPASTO_DATA_DIR=str(tmp_path)).stdout
    assert "phone" in listed
    assert "active" in listed
    assert key not in listed
    assert impasto("keys", "revoke", "phone", "--data-dir", tmp_path).returncode == 0
    assert "revoked" in impasto("keys", "list", "--data-dir", tmp_path).stdout


def test_what_a_key_may_do_is_set_when_it_is_made_and_changed_later(tmp_path):
    """Scopes, an end and limits show in the list; ``default`` gives a limit back to the settings."""
    here = ("--data-dir", tmp_path)
    options = ("--scope", "read", "--expires", "30d", "--rate", "60", "--daily", "2.5", "--weight", "2")
    assert impasto("keys", "create", "phone", *options, *here).returncode == 0
    listed = impasto("keys", "list", *here).stdout
    assert "until 2" in listed
    assert "60 a minute, 2.5 pictures a day, weight 2" in " ".join(listed.replace("│", " ").split())
    assert " generate" not in listed
    changed = impasto("keys", "limit", "phone", "--rate", "default", "--running", "0", *here)
    assert "any running, 2.5 pictures a day, weight 2" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("create", "x", "--expires", "soon"), "--expires must be a number and s, m, h, d or w"),
        (("create", "x", "--scope", "admin"), "--scope must be one of generate, read, metrics"),
        (("create", "x", "--rate", "-1"), "rate must be from 0"),
        (("limit", "x"), "needs something to change"),
        (("limit", "x", "--queued", "many"), "--queued must be a number or default"),
    ],
)
def test_a_wrong_option_of_a_key_is_named(tmp_path, arguments, phrase):
    """And nothing is made or changed."""
    run = impasto("keys", *arguments, "--data-dir", tmp_path)
    assert run.returncode == 2
    assert phrase in run.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "phrase"),
    [
        (("generate", "a fox", "--size", "100*100"), 2, "size must be between 512 and 1536"),
        (("generate", "a fox", "--steps", "99"), 2, "num_inference_steps must be between 1 and 50"),
        (("generate", "a fox", "-o", "fox.gif"), 2, "output must end in"),
        (("generate", "a fox", "--scheduler", "magic"), 2, "scheduler must be one of euler"),
        (("generate", " "), 2, "prompt must not be empty"),
        (("generate", "a fox", "--model", "nowhere"), 1, "'nowhere' was not found"),
        (("generate", "a fox", "--lora", "a:b"), 1, "--lora 'a:b' was not found"),
        (("generate", "a fox", "--lora", f"{FOX}:0.5"), 1, f"--lora {FOX}:0.5 is a picture"),
        (("generate", "a fox", *["--lora", FOX] * 6), 2, "--lora takes at most 5 items"),
        (("generate", "a fox", "--image", "gone.png"), 2, "--image gone.png cannot be read (No such file"),
        (("generate", "a fox", "--image", "."), 2, "--image . cannot be read (Is a directory)"),
        (("generate", "a fox", "--image", PYTHON_FILE), 2, "--image is text; send a PNG, JPEG, WebP, GIF or"),
        (("generate", "a fox", "--mask", "gone.png"), 2, "--mask needs a picture to paint into; give --image as well"),
        (("generate", "a fox", "--image", FOX, "--mask", "gone.png"), 2, "--mask gone.png cannot be read"),
        (("generate", "a fox", "--image", FOX, "--strength", "0"), 2, "strength must be between 0.01 and 1"),
        (("generate", "a fox", "--refine", "base_image_refiner"), 2, "needs a refiner; give --refiner MODEL as well"),
        (("generate", "a fox", "--refine", "magic"), 2, "refine must be one of no_refiner, expert_ensemble_refiner"),
        (("generate", "a fox", "--high-noise-frac", "2"), 2, "high_noise_frac must be between 0 and 1"),
        (("generate", "a fox", "--acceleration", "turbo"), 2, "acceleration must be one of exact, balanced, fast"),
        (("generate", "a fox", "--refine-steps", "99"), 2, "refine_steps must be between 1 and 50"),
        (("generate", "a fox", "--embedding", "sketch"), 2, "--embedding must be TOKEN=PATH"),
        (("generate", "a fox", "--embedding", "a b=c"), 2, "give one word without spaces"),
        (("generate", "a fox", "--accel", "magic"), 2, "accel: unknown item 'magic'"),
        (
            ("generate", "a fox", "--lora", "gone.safetensors:0.5", "--steps", "1"),
            1,
            "'gone.safetensors' was not found",
        ),
        (("serve", "--port", "99999", "--model", "fake"), 2, "port"),
        (("keys", "revoke", "nobody"), 1, "no key in use has this name"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(tmp_path, arguments, status, phrase):
    """No trace, a status that scripts can use, and nothing written."""
    run = impasto(*arguments, cwd=tmp_path)
    assert run.returncode == status
    assert phrase in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("*.png"))


def test_generate_saves_numbered_pictures_of_the_asked_size(tmp_path):
    """Two pictures, their seeds said, options taken from the environment where not given."""
    folder = save_random_sdxl(tmp_path / "model")
    run = impasto(
        "generate", "a fox", "-o", tmp_path / "new" / "fox.jpg", "--model", folder, "--steps", "1", "--seed", "5",
        IMPASTO_COUNT="2", IMPASTO_SIZE="520x512",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for i in range(2):
        with Image.open(tmp_path / "new" / f"fox-{i}.jpg") as picture:
            assert (picture.format, picture.size) == ("JPEG", (520, 512))
            assert f"Seed: {5 + i}, Size: 520x512, Model hash: " in told_by(picture)
        assert f"fox-{i}.jpg  seed {5 + i}" in run.stderr


def told_by(picture: Image.Image) -> str | None:
    """The parameters in a picture's file."""
    if picture.format == "PNG":
        return picture.info.get("parameters")
    comment = picture.getexif().get_ifd(0x8769).get(0x9286)
    return comment and comment[8:].decode("utf-16-be")


class Stub:
    """Stands where the engine does, and remembers what it was asked for."""

    loaded: dict
    request: GenerationRequest

    @classmethod
    def load(cls, model, **options):
        cls.loaded = {"model": model, **options}
        return cls()

    def generate(self, request):
        type(self).request = request
        yield ImageReady("x", 0, request.seed, Image.new("RGB", (request.width, request.height)))


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The command line in this process, without networks."""
    monkeypatch.setattr("impasto.engine.engine.Engine", Stub)
    monkeypatch.chdir(tmp_path)
    return Stub


def run_generate(*arguments) -> None:
    app(["generate", "a fox", *map(str, arguments)], standalone_mode=False)


def test_every_option_of_the_modes_reaches_the_engine(stub, tmp_path):
    """Pictures are read, the mask as grey; words and files of embeddings are told apart."""
    Image.new("RGB", (700, 520), "green").save(tmp_path / "fox.jpg")
    Image.new("RGBA", (700, 520), (255, 0, 0, 255)).save(tmp_path / "mask.png")
    run_generate(
        "--image", "fox.jpg", "--mask", "mask.png", "--strength", 0.4, "--refine", "base_image_refiner",
        "--refiner", "some-refiner", "--high-noise-frac", 0.7, "--refine-steps", 9, "--weighted",
        "--acceleration", "fast",
        "--embedding", "sketch=a.safetensors", "--embedding", "ink=b=c.safetensors",
        "--accel", "channels_last,offload=encoders",
    )  # fmt: skip
    request = stub.request
    assert (request.image.mode, request.image.size) == ("RGB", (700, 520))
    assert (request.mask_image.mode, request.mask_image.getpixel((9, 9))) == ("L", 76)
    assert (request.strength, request.refine) == (0.4, "base_image_refiner")
    assert (request.high_noise_frac, request.refine_steps) == (0.7, 9)
    assert (request.prompt_syntax, request.acceleration) == ("weighted", "fast")
    assert request.embeddings == (EmbeddingRef("sketch", "a.safetensors"), EmbeddingRef("ink", "b=c.safetensors"))
    assert stub.loaded["refiner"] == "some-refiner"
    assert stub.loaded["accel"] == Accel(channels_last=True, offload="encoders")


@pytest.mark.parametrize(
    ("options", "size"),
    [(("--image", "fox.png"), (696, 520)), (("--image", "fox.png", "--size", "768*512"), (768, 512))],
)
def test_the_size_is_the_start_picture_s_unless_it_is_given(stub, tmp_path, options, size):
    """Rounded to the grid of 8 pixels."""
    Image.new("RGB", (699, 522)).save(tmp_path / "fox.png")
    run_generate(*options)
    assert (stub.request.width, stub.request.height) == size


@pytest.mark.parametrize("name", ["fox.png", "fox.jpg", "fox.webp"])
def test_pictures_tell_how_they_were_made(stub, tmp_path, name):
    """As the service's do: prompts, settings, the LoRA by the user's word for it, hashes; nothing of this machine."""
    lora = tmp_path / "private" / "ink.v2.safetensors"
    lora.parent.mkdir()
    lora.write_bytes(b"never read by this engine")
    run_generate("-o", name, "--seed", 7, "--negative", "blurry", "--lora", f"{lora}:0.8", "--steps", 9)
    with Image.open(name) as picture:
        text = told_by(picture)
    assert text is not None
    first, negative, last = text.split("\n")
    assert (first, negative) == ("a fox <lora:ink.v2:0.8>", "Negative prompt: blurry")
    assert last.startswith("Steps: 9, Sampler: Euler, CFG scale: 5, Seed: 7, Size: ")
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert f'\\"lora:ink.v2\\": \\"{digest[:10]}\\"' in last
    assert ", Model: builtin, " in last
    assert "private" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["private", name]), "no folder is made for hashes"


def test_pictures_say_nothing_where_that_is_not_wanted(stub, monkeypatch):
    """By option, by variable, and an option goes before a variable."""

    def told(*options) -> bool:
        run_generate("-o", "a.png", "--seed", 7, *options)
        with Image.open("a.png") as picture:
            return told_by(picture) is not None

    assert told()
    assert not told("--no-metadata")
    monkeypatch.setenv("IMPASTO_EMBED_METADATA", "false")
    assert not told()
    assert told("--metadata")


def test_without_the_options_nothing_changes(stub):
    """Text to image, plain prompts, no refiner, the plain way to run."""
    run_generate("--size", "512*512")
    assert stub.request == GenerationRequest("a fox", width=512, height=512)
    assert stub.loaded["refiner"] is None
    assert stub.loaded["accel"] == Accel()
