"""Settings: where each comes from, what wins, and that mistakes stop start-up by name."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from impasto.config import GenerateSettings, Settings
from impasto.errors import ConfigError

EXAMPLES = {  # one non-default value for every setting: as text, and as read
    "data_dir": ("/tmp/x", Path("/tmp/x")),
    "database_url": ("sqlite:////tmp/y.db", "sqlite:////tmp/y.db"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "storage_url": ("s3://pictures/impasto", "s3://pictures/impasto"),
    "workers": ("2", 2),
    "public_url": ("https://pictures.example", "https://pictures.example"),
    "allowed_hosts": ("a.example,*.b.example", ["a.example", "*.b.example"]),
    "trusted_proxies": ("10.0.0.0/8,::1", ["10.0.0.0/8", "::1"]),
    "cors_origins": ("https://app.example", ["https://app.example"]),
    "max_connections": ("50", 50),
    "max_body_bytes": ("1000", 1000),
    "max_queued": ("7", 7),
    "max_running": ("2", 2),
    "rate_per_minute": ("60", 60),
    "daily_pictures": ("2.5", 2.5),
    "max_waiting": ("0", 0),
    "min_free_bytes": ("1000000", 1_000_000),
    "database_patience": ("0.5", 0.5),
    "log_format": ("json", "json"),
    "audit_log": ("/var/log/audit.jsonl", Path("/var/log/audit.jsonl")),
    "max_upload_bytes": ("1000000", 1_000_000),
    "upload_quota": ("5000000", 5_000_000),
    "upload_seconds": ("3600", 3600.0),
    "output_seconds": ("86400", 86400.0),
    "base64_cache_bytes": ("0", 0),
    "sync_timeout": ("5.5", 5.5),
    "openai_timeout": ("60", 60.0),
    "model": ("fake", "fake"),
    "device": ("cpu", "cpu"),
    "dtype": ("bfloat16", "bfloat16"),
    "max_batch": ("2", 2),
    "refiner": ("/models/refiner", "/models/refiner"),
    "accel": ("compile,channels_last", "compile,channels_last"),
    "lease_seconds": ("3", 3.0),
    "max_attempts": ("1", 1),
    "drain_seconds": ("5", 5.0),
    "keep_seconds": ("3600", 3600.0),
    "fake_step_seconds": ("0.5", 0.5),
    "previews": ("false", False),
    "metrics": ("key", "key"),
    "log_level": ("debug", "debug"),
    "offline": ("true", True),
    "fetch_allow": ("models.corp, 10.0.0.0/8", ["models.corp", "10.0.0.0/8"]),
    "fetch_hosts": ("models.example,*.cdn.example", ["models.example", "*.cdn.example"]),
    "lora_repos": ("team/*,civitai:1", ["team/*", "civitai:1"]),
    "fetch_http": ("true", True),
    "fetch_ports": ("443,8443", [443, 8443]),
    "fetch_seconds": ("5", 5.0),
    "fetch_revalidate": ("0", 0.0),
    "lora_memory_bytes": ("0", 0),
    "lora_switch_bytes": ("9000000000", 9_000_000_000),
    "lora_bytes": ("1000", 1000),
    "cache_bytes": ("9000", 9000),
    "lora_aliases": ("me/x=civitai:1@2, y=https://h/z?a=b", {"me/x": "civitai:1@2", "y": "https://h/z?a=b"}),
    "hf_endpoint": ("https://hub.corp", "https://hub.corp"),
    "hf_token": ("hf_s3cret", SecretStr("hf_s3cret")),
    "hf_token_repos": ("team/*,me/x", ["team/*", "me/x"]),
    "civitai_endpoint": ("http://civitai.corp:8080", "http://civitai.corp:8080"),
    "civitai_token": ("c_s3cret", SecretStr("c_s3cret")),
    "webhook_allow": ("hooks.corp,10.0.0.0/8", ["hooks.corp", "10.0.0.0/8"]),
    "webhook_hosts": ("hooks.example", ["hooks.example"]),
    "webhook_http": ("true", True),
    "webhook_ports": ("443,8443", [443, 8443]),
    "webhook_tries": ("3", 3),
    "webhook_pause": ("0.5", 0.5),
    "webhook_signatures": ("both", "both"),
    "embed_metadata": ("false", False),
    "c2pa_certificate": ("chain.pem", Path("chain.pem")),
    "c2pa_key": ("key.pem", Path("key.pem")),
    "reproduction_record": ("false", False),
    "motion_adapter": ("none", "none"),
    "safety_checker": ("builtin, hf:/models/nsfw#medium+high", "builtin, hf:/models/nsfw#medium+high"),
    "safety_threshold": ("builtin=0.6, hf=0.5", {"builtin": 0.6, "hf": 0.5}),
    "safety_action": ("error", "error"),
    "safety_allow_disable": ("false", False),
    "safety_check_inputs": ("true", True),
    "safety_previews": ("off", False),
    "safety_timeout": ("5", 5.0),
    "safety_device": ("cuda:1", "cuda:1"),
    "prompt_denylist": ("/etc/impasto/words.txt", Path("/etc/impasto/words.txt")),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """No ``impasto.toml`` of the checkout is picked up."""
    monkeypatch.chdir(tmp_path)


def test_every_setting_has_an_example():
    """A new setting needs a line in this file."""
    assert set(EXAMPLES) == set(Settings.model_fields)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_setting_is_read_from_the_environment_and_from_toml(name, monkeypatch, tmp_path):
    """``IMPASTO_NAME`` and ``name = …`` both set it."""
    text, value = EXAMPLES[name]
    assert getattr(Settings.load(), name) != value

    (tmp_path / "impasto.toml").write_text(f'{name} = "{text}"')
    assert getattr(Settings.load(), name) == value

    (tmp_path / "impasto.toml").unlink()
    monkeypatch.setenv(f"IMPASTO_{name.upper()}", text)
    assert getattr(Settings.load(), name) == value


def test_the_command_line_wins_over_the_environment_over_toml(monkeypatch, tmp_path):
    """The nearer to the user's fingers, the stronger."""
    (tmp_path / "impasto.toml").write_text("port = 1001")
    assert Settings.load().port == 1001
    monkeypatch.setenv("IMPASTO_PORT", "1002")
    assert Settings.load().port == 1002
    assert Settings.load(overrides={"port": 1003}).port == 1003
    assert Settings.load(overrides={"port": None}).port == 1002, "None means not given"


def test_a_child_process_reads_the_same_settings(monkeypatch):
    """``to_environment`` carries every value, the data folder made absolute."""
    settings = Settings.load(overrides={name: text for name, (text, _) in EXAMPLES.items()})
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load().model_dump() == settings.model_dump()


@pytest.mark.parametrize(
    ("source", "phrase"),
    [("port = 70000", "port"), ("port = 'x'", "port"), ("prot = 8000", "prot"), ("dtype = 'int8'", "dtype"),
     ("public_url = 'ftp://x'", "public_url"), ("lora_aliases = 'x'", "lora_aliases"),
     ("hf_endpoint = 'x'", "hf_endpoint"), ("trusted_proxies = 'nginx'", "trusted_proxies"),
     ("cors_origins = 'null'", "cors_origins"), ("cors_origins = 'https://a.example/x'", "cors_origins"),
     ("cors_origins = 'https://*.example'", "cors_origins"),
     ("safety_checker = 'buildin'", "safety_checker"), ("safety_checker = 'builtin,none'", "safety_checker"),
     ("safety_threshold = 'hv=0.5'", "safety_threshold"), ("safety_threshold = -1", "safety_threshold"),
     ("max_batch = 0", "max_batch"), ("port = ", "TOML")],
)  # fmt: skip
def test_a_wrong_file_stops_start_up_and_is_named(tmp_path, source, phrase):
    """Bad values, unknown names and broken syntax are errors, not defaults."""
    (tmp_path / "impasto.toml").write_text(source)
    with pytest.raises(ConfigError, match=phrase):
        Settings.load()


def test_aliases_are_a_table_of_the_file(tmp_path):
    """Names with slashes and references of every kind; lists are TOML's own, too."""
    (tmp_path / "impasto.toml").write_text('fetch_ports = [443]\n[lora_aliases]\n"me/x" = "o/n@v1"\n')
    settings = Settings.load()
    assert (settings.lora_aliases, settings.fetch_ports) == ({"me/x": "o/n@v1"}, [443])


@pytest.mark.parametrize("source", ["0.7", "'0.7'"])
def test_one_threshold_is_for_all_checkers(tmp_path, source):
    """As a number and as text."""
    (tmp_path / "impasto.toml").write_text(f"safety_threshold = {source}")
    assert Settings.load().safety_threshold == {"builtin": 0.7, "compvis": 0.7, "hf": 0.7}


def test_tokens_are_not_shown():
    """Neither by printing the settings nor in an error."""
    settings = Settings.load(overrides={"hf_token": "hf_s3cret", "civitai_token": "c_s3cret"})
    assert "s3cret" not in f"{settings!r} {settings} {settings.model_dump()}"


def test_a_misspelt_variable_is_an_error_with_a_hint(monkeypatch):
    """A variable nobody reads would be lost in silence."""
    monkeypatch.setenv("IMPASTO_PROT", "8000")
    with pytest.raises(ConfigError, match="IMPASTO_PORT"):
        Settings.load()


def test_a_named_file_must_exist(monkeypatch, tmp_path):
    """Both ways of naming one."""
    with pytest.raises(ConfigError, match="nowhere"):
        Settings.load(tmp_path / "nowhere.toml")
    monkeypatch.setenv("IMPASTO_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="gone"):
        Settings.load()


def test_generate_has_a_table_of_its_own(monkeypatch, tmp_path):
    """``[generate]`` holds its defaults; model settings at the top level count for it too."""
    (tmp_path / "impasto.toml").write_text(
        'model = "fake"\nport = 1\n[generate]\nsteps = 12\nlora = ["a:0.5"]\nsize = "512*512"'
    )
    settings = GenerateSettings.load()
    assert (settings.model, settings.steps, settings.lora, settings.size) == ("fake", 12, ["a:0.5"], "512*512")
    monkeypatch.setenv("IMPASTO_STEPS", "9")
    assert GenerateSettings.load().steps == 9
    assert Settings.load().port == 1


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch):
    """One variable, several LoRAs or embeddings."""
    monkeypatch.setenv("IMPASTO_LORA", "a.safetensors:0.5, b.safetensors")
    monkeypatch.setenv("IMPASTO_EMBEDDING", "x=a.safetensors,y=b.safetensors")
    assert GenerateSettings.load().lora == ["a.safetensors:0.5", "b.safetensors"]
    assert GenerateSettings.load().embedding == ["x=a.safetensors", "y=b.safetensors"]


GENERATE_EXAMPLES = {
    "output": ("fox.webp", Path("fox.webp")),
    "negative": ("blurry", "blurry"),
    "size": ("512*512", "512*512"),
    "steps": ("9", 9),
    "guidance": ("2.5", 2.5),
    "scheduler": ("ddim", "ddim"),
    "seed": ("77", 77),
    "count": ("3", 3),
    "lora": ("a", ["a"]),
    "image": ("fox.png", Path("fox.png")),
    "mask": ("head.png", Path("head.png")),
    "strength": ("0.5", 0.5),
    "refine": ("base_image_refiner", "base_image_refiner"),
    "high_noise_frac": ("0.7", 0.7),
    "refine_steps": ("12", 12),
    "acceleration": ("fast", "fast"),
    "weighted": ("true", True),
    "embedding": ("sketch=a.safetensors", ["sketch=a.safetensors"]),
    **{name: EXAMPLES[name] for name in ("model", "device", "dtype", "max_batch", "refiner", "accel")},
}


def test_every_setting_of_generate_has_an_example():
    """A new setting needs a line in this file."""
    assert set(GENERATE_EXAMPLES) == set(GenerateSettings.model_fields)


@pytest.mark.parametrize("name", GENERATE_EXAMPLES)
def test_each_setting_of_generate_is_read_from_the_environment(name, monkeypatch):
    """``IMPASTO_NAME`` sets it."""
    text, value = GENERATE_EXAMPLES[name]
    assert getattr(GenerateSettings.load(), name) != value
    monkeypatch.setenv(f"IMPASTO_{name.upper()}", text)
    assert getattr(GenerateSettings.load(), name) == value
