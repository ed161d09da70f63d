"""Secrets stay out of logs, rows, answers and files, whatever is done with them."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import httpx
import pytest

from impasto.redaction import HIDDEN, RedactingFormatter, redacted
from tests.e2e.conftest import KEY, SDXL_LORA, ended, poll
from tests.e2e.conftest import serve as serve_process

served = serve_process  # the fixture that starts ``impasto serve``

KEY_LIKE = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Authorization: Bearer {KEY_LIKE}", f"Authorization: Bearer {HIDDEN}"),
        (f"{{'authorization': 'bearer {KEY_LIKE}'}}", f"{{'authorization': 'bearer {HIDDEN}'}}"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {HIDDEN}"),
        (f"key {KEY_LIKE} is unknown", f"key {HIDDEN} is unknown"),
        ("https://h.example/x?token=s3cret&a=1", f"https://h.example/x?token={HIDDEN}&a=1"),
        ("https://h.example/x?a=1&X-Amz-Signature=s3cret#f", f"https://h.example/x?a=1&X-Amz-Signature={HIDDEN}#f"),
        ("https://h.example/x?api_key=s3cret'", f"https://h.example/x?api_key={HIDDEN}'"),
        ("postgresql+psycopg://me:s3cret@db.example/x", f"postgresql+psycopg://{HIDDEN}@db.example/x"),
        ("token hf_abcdefghijklmnop refused", f"token hf_{HIDDEN} refused"),
        ("whsec_dGhpcyBpcyBhIHNlY3JldA==", f"whsec_{HIDDEN}"),
    ],
)
def test_what_looks_like_a_secret_is_not_logged(text, shown):
    """Keys, tokens, passwords, signed addresses; what stands around them stays."""
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "job 0123456789abcdef0123456789abcdef: attempt 1", f"LoRA 'x' is {KEY_LIKE}.safetensors", f"sha256:{KEY_LIKE}",
        "https://h.example/x?size=512*512&seed=7", "a bearer of good news", "person@h.example",
    ],
)  # fmt: skip
def test_what_an_operator_needs_is_logged(text):
    """Ids, hashes of files, ordinary addresses: hiding everything would be no log."""
    if "bearer" not in text:
        assert redacted(text) == text


def test_traces_are_redacted_too():
    """An exception's text is where secrets turn up by chance."""
    try:
        raise ValueError(f"cannot open https://h.example/?token={KEY_LIKE}")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed with %s", (f"Bearer {KEY_LIKE}",), info)
    plain = logging.Formatter("%(message)s").format(record)
    assert KEY_LIKE in plain, "the control"
    record.exc_text = None
    assert KEY_LIKE not in RedactingFormatter("%(message)s").format(record)


TOKENS = {"IMPASTO_HF_TOKEN": "hf_sentinelsentinel", "IMPASTO_CIVITAI_TOKEN": "sentinel-civitai-token"}


def test_a_whole_run_leaves_no_secret_behind(served, tmp_path):
    """Log at its most talkative, database, files, answers: after good and bad requests neither the key nor a token is
    in any of them, but for the one line that shows the new key. The control: the search finds what is there."""
    process = served("--model", "fake", IMPASTO_LOG_LEVEL="debug", **TOKENS)
    key = process.wait_for(KEY)
    api, answers = process.api(key), []
    bad = {"image": f"https://user:pw-sentinel@h.example/x?token={key}"}
    signed = f"https://127.0.0.1/x.safetensors?token={key}&sig=sentinel-sig"
    for body in ({}, bad, {"loras": [{"path": signed}]}, {"prompt": f"Bearer {key} is not for the log"}):
        answer = api.post(SDXL_LORA, json={"prompt": "a red fox", "size": "512*512", "num_inference_steps": 1} | body)
        if answer.status_code == 200:
            answers.append(str(poll(api, answer.json()["data"]["id"], ended)))
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}, {"X-API-Key": key}):
        answers.append(httpx.get(f"{process.url}/api/v3/models?token={key}", headers=headers, trust_env=False).text)
    answers += [api.get(path).text for path in ("/", "/openapi.json", "/metrics", "/api/v3/balance", "/nothing")]
    process.stop()
    log = "".join(process.log)
    assert "attempt 1" in log, "the control"
    assert log.count(key) == 1
    assert not [token for token in (*TOKENS.values(), "sentinel-sig", "pw-sentinel") if token in log]
    for token in TOKENS.values():
        assert token not in "".join(answers)
    for file in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        data = file.read_bytes()
        assert not [token for token in TOKENS.values() if token.encode() in data], file
    rows = keys_table(tmp_path / "data" / "impasto.db")
    assert rows
    assert not [row for row in rows if key in row], "a key's row has its hash alone"


def keys_table(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        return [str(row) for row in connection.execute("select * from keys")]
