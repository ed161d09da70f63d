"""Settings of the service: the only reader of the environment and of ``impasto.toml``.

Knows names, types, defaults and where a value may come from. Knows nothing of what is done with it.
A value is taken from, first found wins: the command line, ``IMPASTO_…`` variables, the TOML file, the default.
A wrong value or an unknown name stops start-up with the setting's name in the message.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, SecretStr, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from impasto.errors import ConfigError
from impasto.types import ACCELERATIONS, LIMITS, REFINE_MODES, SCHEDULERS

Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^\s/*?#@]+)$")]
CheckerKind = Literal["builtin", "compvis", "hf"]
PREFIX = "IMPASTO_"
CONFIG_VARIABLE = "IMPASTO_CONFIG"  # names the TOML file
DEFAULT_CONFIG = Path("impasto.toml")
GENERATE_TABLE = "generate"  # TOML table of ``impasto generate``; the service's settings stand at the top level

_FORMAT = "(auto|float32|bfloat16|float16)"
CHECKERS = r"^\s*(none|(builtin|(compvis|hf):[^,]+)(,\s*(builtin|(compvis|hf):[^,]+))*)\s*$"
DTYPES = rf"^{_FORMAT}?(,?(unet|vae|text)={_FORMAT})*$"


class _Layered(BaseSettings):
    """Values from the command line, then the environment, then a TOML table, then the defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, protected_namespaces=())
    toml: ClassVar[Mapping[str, Any]] = {}

    model: str = Field(
        "builtin",
        description="'builtin', a diffusers folder, a .safetensors checkpoint, a hub id, or 'fake' (test pattern).",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'; 'cuda,text=cpu' for parts.")
    dtype: str = Field(
        "auto",
        pattern=DTYPES,
        description="float32, bfloat16, float16; 'bfloat16,vae=float32' for parts; auto: float32 on CPU, else float16.",
    )
    max_batch: int = Field(4, ge=1, le=64, description="Images that share one network call.")
    refiner: str | None = Field(None, description="A refiner model, named like 'model'. Unset: requests cannot refine.")
    accel: str = Field("", description="Faster ways to run, such as auto, or compile,offload=encoders.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, then environment, then the TOML table."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=dict(cls.toml))

    @classmethod
    def load(cls, config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read the settings; ``overrides`` are command-line values, where ``None`` means not given.

        Raises:
            ConfigError: A value is wrong or a name is unknown; the message has a part for each.
        """
        _check_variables()
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        layered = type(cls.__name__, (cls,), {"toml": cls.table(_read_toml(config)), "__module__": cls.__module__})
        try:
            return layered(**given)  # type: ignore[no-any-return]
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ConfigError("settings: " + "; ".join(lines)) from None

    @classmethod
    def table(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of the TOML document that these settings are read from."""
        raise NotImplementedError


class Settings(_Layered):
    """Everything an operator can set for ``impasto serve`` and ``impasto worker``."""

    data_dir: Path = Field(
        Path("impasto-data"), description="Folder for the database, pictures and LoRAs; made if it is not there."
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL of the job store. Unset: SQLite in data_dir.")
    storage_url: str | None = Field(
        None, description="Where pictures and uploads are kept: a folder or s3://bucket/prefix. Unset: in data_dir."
    )
    workers: int | None = Field(
        None, ge=0, le=64, description="Worker processes beside the API. Unset: one for each GPU, else one; 0: none."
    )
    host: str = Field("127.0.0.1", description="Address the API listens on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on; 0 takes a free one.")
    public_url: str | None = Field(
        None, pattern=r"^https?://", description="Base of the URLs in answers. Unset: the host the client called."
    )
    allowed_hosts: Annotated[list[str], NoDecode] = Field(
        [], description="Names this service answers to, such as pictures.example or *.example; none named: any."
    )
    trusted_proxies: Annotated[list[str], NoDecode] = Field(
        [], description="Addresses and blocks of proxies whose X-Forwarded-For, -Proto and -Host are believed."
    )
    cors_origins: Annotated[list[Origin], NoDecode] = Field(
        [], description="Origins whose pages may read answers, such as https://app.example; * is every one."
    )
    max_connections: int = Field(1000, ge=10, description="Connections held at once; beyond it requests get 503.")
    max_body_bytes: int = Field(32 * 2**20, gt=0, description="Largest request body taken, in bytes.")
    max_upload_bytes: int = Field(2**30, gt=0, description="Largest file taken as an upload, in bytes.")
    upload_quota: int = Field(10 * 2**30, gt=0, description="Bytes that the uploads of one key may take together.")
    upload_seconds: float = Field(
        7 * 86400, gt=0, description="Seconds until an upload is deleted; the default is 7 days."
    )
    output_seconds: float = Field(
        0, ge=0, description="Seconds from a job's end until its pictures are deleted; 0 keeps them."
    )
    keep_seconds: float = Field(
        0, ge=0, description="Seconds from a prediction's end until it is deleted whole; 0 keeps it."
    )
    base64_cache_bytes: int = Field(
        128 * 2**20, ge=0, description="Memory for finished answers with base64, so that each is encoded once."
    )
    max_queued: int = Field(1000, gt=0, description="Jobs one key may have waiting; beyond it submits get 429.")
    max_running: int = Field(0, ge=0, description="Jobs of one key that run at once; 0: no limit.")
    rate_per_minute: int = Field(0, ge=0, description="Submits and uploads one key may send a minute; 0: no limit.")
    daily_pictures: float = Field(0, ge=0, description="Default pictures' worth one key may have a day; 0: no limit.")
    max_waiting: int = Field(10_000, ge=0, description="Jobs of all keys that may wait; then submits get 503. 0: any.")
    min_free_bytes: int = Field(2**29, ge=0, description="Free disk space below which submits and uploads get 503.")
    database_patience: float = Field(10, ge=0, description="Seconds that polls wait for a database that is away.")
    sync_timeout: float = Field(90, gt=0, description="Seconds a synchronous request is held before it turns async.")
    openai_timeout: float = Field(600, gt=0, description="Seconds a request to /v1 is held; then its job is cancelled.")
    lease_seconds: float = Field(30, gt=0, description="A worker silent for this long loses its jobs to another.")
    drain_seconds: float = Field(
        0, ge=0, description="Seconds a worker that is told to stop may use to finish its jobs; others get the rest."
    )
    max_attempts: int = Field(3, ge=1, description="Times a job is started before it is given up.")
    motion_adapter: str = Field("auto", description="For videos: builtin, a folder, a hub id; none; auto: the model's.")
    fake_step_seconds: float = Field(0.02, ge=0, description="How long a step of the model 'fake' takes, in seconds.")
    previews: bool = Field(True, description="Show roughly what pictures of running jobs are becoming.")
    metrics: Literal["open", "key", "off"] = Field(
        "open", description="Who may read /metrics: everybody, keys with the scope metrics, or nobody."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or as JSON for programs.")
    audit_log: Path | None = Field(None, description="File of who did what, as JSON lines. Unset: none is written.")
    offline: bool = Field(False, description="Call no other hosts for requests: no LoRAs, no pictures, no webhooks.")
    fetch_allow: Annotated[list[str], NoDecode] = Field(
        [], description="Hosts and address blocks that are fetched from though they are not public, such as 10.0.0.0/8."
    )
    fetch_hosts: Annotated[list[str] | None, NoDecode] = Field(
        None,
        description="The only hosts that LoRAs and pictures are fetched from, beside the hub and Civitai: "
        "names or *.example. Unset: any public one.",
    )
    lora_repos: Annotated[list[str] | None, NoDecode] = Field(
        None,
        description="The only repositories whose LoRAs are fetched: owner/name, owner/*, civitai:MODEL, "
        "civitai:*. Unset: any.",
    )
    fetch_http: bool = Field(False, description="Fetch from plain http addresses, too.")
    fetch_ports: Annotated[list[int], NoDecode] = Field([80, 443], description="Ports that are fetched from.")
    fetch_seconds: float = Field(600, gt=0, description="Longest time for one LoRA's download, in seconds.")
    fetch_revalidate: float = Field(300, ge=0, description="Seconds until a site is asked again for what it has.")
    lora_memory_bytes: int | None = Field(
        None, ge=0, description="Main memory for LoRA files read lately. Unset: an eighth of what is free, up to 4 GiB."
    )
    lora_switch_bytes: int | None = Field(
        None,
        ge=0,
        description="Memory beside the weights for LoRAs that were on lately; twice a LoRA's weights make switches "
        "copies. Unset: an eighth of what is free, up to 16 GiB.",
    )
    lora_bytes: int = Field(2 * 2**30, gt=0, description="Largest LoRA that is fetched, in bytes.")
    cache_bytes: int = Field(20 * 2**30, gt=0, description="Disk space for fetched LoRAs; the longest unused go first.")
    lora_aliases: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="Names for LoRAs: NAME=LORA, where LORA is whatever a request may name."
    )
    hf_endpoint: str = Field("https://huggingface.co", pattern=r"^https?://", description="The hub, or a mirror of it.")
    hf_token: SecretStr | None = Field(None, description="Token for the hub, shown for hf_token_repos alone.")
    hf_token_repos: Annotated[list[str], NoDecode] = Field(
        [], description="Repositories whose LoRAs any key may use by way of hf_token: owner/name, owner/*, or *."
    )
    civitai_endpoint: str = Field(
        "https://civitai.com", pattern=r"^https?://", description="Civitai, or a mirror of it."
    )
    civitai_token: SecretStr | None = Field(None, description="Key for Civitai, shown to it for every model.")
    webhook_allow: Annotated[list[str], NoDecode] = Field(
        [], description="Hosts and address blocks that webhooks are sent to though they are not public."
    )
    webhook_hosts: Annotated[list[str] | None, NoDecode] = Field(
        None, description="The only hosts that webhooks are sent to: names or *.example. Unset: any public one."
    )
    webhook_http: bool = Field(False, description="Send webhooks to plain http addresses, too.")
    webhook_ports: Annotated[list[int], NoDecode] = Field([80, 443], description="Ports that webhooks are sent to.")
    webhook_tries: int = Field(8, ge=1, le=50, description="Times a webhook is sent until somebody takes it.")
    webhook_pause: float = Field(
        10, ge=0.1, description="Seconds before a webhook's second try; each later pause is four times as long."
    )
    webhook_signatures: Literal["v3", "standard", "both"] = Field(
        "v3", description="How webhooks are signed: as the hosted API does, by Standard Webhooks, or both."
    )

    embed_metadata: bool = Field(
        True, description="Write prompt, seed and parameters into picture files; requests can decline."
    )
    c2pa_certificate: Path | None = Field(None, description="Certificate chain (PEM) to sign pictures with by C2PA.")
    c2pa_key: Path | None = Field(None, description="That certificate's private key (PEM, no password).")
    reproduction_record: bool = Field(
        True, description="Tell with each finished prediction what it takes to make it again: hashes, versions, device."
    )

    @field_validator(
        "allowed_hosts", "cors_origins", "fetch_allow", "fetch_hosts", "fetch_ports", "hf_token_repos", "lora_repos",
        "trusted_proxies", "webhook_allow", "webhook_hosts", "webhook_ports", mode="before",
    )  # fmt: skip
    @classmethod
    def _list(cls, value: Any) -> Any:
        """Read ``a,b`` from the environment."""
        return _parts(value) if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for entry in value:
            ip_network(entry)
        return value

    safety_checker: str = Field(
        "builtin",
        pattern=CHECKERS,
        description="What checks pictures: builtin, compvis:NAME, hf:NAME, several with commas; or none.",
    )
    safety_threshold: Annotated[dict[CheckerKind, NonNegativeFloat], NoDecode] = Field(
        {}, description="Score from which a picture is flagged: for all checkers, or builtin=0.8,hf=0.5."
    )
    safety_action: Literal["black", "blur", "error"] = Field(
        "black", description="What a flagged picture becomes: black, blurred, or the end of its prediction."
    )
    safety_allow_disable: bool = Field(True, description="Whether requests may switch the checker off.")
    safety_check_inputs: bool = Field(False, description="Check start pictures, too.")
    safety_previews: bool = Field(
        True, description="Show previews, which nobody checks, of pictures that will be checked."
    )
    safety_timeout: float = Field(60, gt=0, description="Longest time for the check of a picture, in seconds.")
    safety_device: str = Field("auto", description="Where compvis and hf checkers run; auto: on a GPU if there is one.")
    prompt_denylist: Path | None = Field(
        None, description="File of words and phrases, one a line, that prompts may not have."
    )

    @field_validator("safety_threshold", mode="before")
    @classmethod
    def _thresholds(cls, value: Any) -> Any:
        """Read one number for all checkers, or ``builtin=0.8,hf=0.5``, or JSON, from the environment."""
        if isinstance(value, str):
            if value.lstrip().startswith("{"):
                return json.loads(value)
            if "=" in value:
                return dict(part.split("=", 1) for part in _parts(value) if "=" in part)
        return value if isinstance(value, dict) else dict.fromkeys(get_args(CheckerKind), value)

    @field_validator("lora_aliases", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        """Read ``name=lora,name=lora``, or JSON, from the environment."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        pairs = [[word.strip() for word in part.split("=", 1)] for part in _parts(value)]
        if any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise ValueError("write NAME=LORA, with commas between")
        return dict(pairs)

    @property
    def database(self) -> str:
        """URL of the job store, with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'impasto.db'}"

    @property
    def output_root(self) -> str:
        """Where pictures are kept: a folder, as a path, or a bucket, as a URL."""
        return self.storage_url or str(self.data_dir.resolve() / "outputs")

    @property
    def incoming_dir(self) -> Path:
        """Folder of uploads that are still coming in."""
        return self.data_dir.resolve() / "incoming"

    @property
    def lora_dir(self) -> Path:
        """Folder whose ``.safetensors`` files requests may name."""
        return self.data_dir / "loras"

    @property
    def cache_dir(self) -> Path:
        """Folder of what was fetched from other hosts."""
        return self.data_dir.resolve() / "cache"

    def to_environment(self) -> dict[str, str]:
        """Return the settings as ``IMPASTO_…`` variables, so that a child process reads the same values."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["data_dir"] = str(self.data_dir.resolve())
        values |= {name: v.get_secret_value() for name, v in self if isinstance(v, SecretStr)}
        return {PREFIX + name.upper(): _in_environment(value) for name, value in values.items()}

    @classmethod
    def table(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        """The top level, without the table of ``impasto generate``."""
        return {name: value for name, value in document.items() if name != GENERATE_TABLE}


class GenerateSettings(_Layered):
    """Defaults of ``impasto generate``, so that they can stand in the environment or in ``[generate]``."""

    output: Path = Field(Path("out.png"), description="Picture file: .png, .jpg or .webp.")
    negative: str | None = Field(None, description="What to keep out of the picture.")
    size: str | None = Field(
        None, description="W*H in pixels. Unset: the start picture's, or what the model draws best."
    )
    steps: int = Field(int(LIMITS.num_inference_steps.default), description="Denoising steps.")
    guidance: float = Field(LIMITS.guidance_scale.default, description="Pull of the prompt; 0 and 1: off.")
    scheduler: str = Field(SCHEDULERS[0], description=f"Sampler: {', '.join(SCHEDULERS)}.")
    seed: int = Field(int(LIMITS.seed.default), description="Same seed, same picture; -1 draws one.")
    count: int = Field(int(LIMITS.num_images.default), description="Pictures to make, with seeds seed, seed+1, …")
    lora: Annotated[list[str], NoDecode] = Field(
        [], description="NAME or NAME:SCALE, a file or what a request may name; up to five times, or with commas."
    )
    image: Path | None = Field(None, description="Start picture: PNG, JPEG, WebP, GIF or BMP.")
    mask: Path | None = Field(None, description="Where to paint in the start picture: white is painted, black kept.")
    strength: float = Field(LIMITS.strength.default, description="How far from the start picture, up to 1.")
    refine: str = Field(REFINE_MODES[0], description=f"Use of the refiner: {', '.join(REFINE_MODES)}.")
    high_noise_frac: float = Field(
        LIMITS.high_noise_frac.default, description="Share of the noise schedule before the refiner takes over."
    )
    refine_steps: int | None = Field(None, description="Steps of the second pass's schedule. Unset: as the base's.")
    acceleration: str = Field(ACCELERATIONS[0], description=f"Exactness given for speed: {', '.join(ACCELERATIONS)}.")
    weighted: bool = Field(False, description="Read (word:1.2) and BREAK in prompts as weights and a new window.")
    embedding: Annotated[list[str], NoDecode] = Field(
        [], description="TOKEN=PATH of a textual inversion, repeatable; in the environment with commas between."
    )

    @field_validator("lora", "embedding", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Read ``a.safetensors:0.5,b.safetensors`` from the environment."""
        return _parts(value) if isinstance(value, str) else value

    @classmethod
    def table(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        """``[generate]``, and the model settings of the top level."""
        shared = {name: document[name] for name in _Layered.model_fields if name in document}
        return {**shared, **document.get(GENERATE_TABLE, {})}


def _parts(text: str) -> list[str]:
    """Split at commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _in_environment(value: Any) -> str:
    """Write a value so that the environment's reader understands it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_variables() -> None:
    """Refuse ``IMPASTO_…`` variables that no setting reads: a misspelt one would be lost in silence."""
    fields = Settings.model_fields | GenerateSettings.model_fields
    known = {PREFIX + name.upper() for name in fields} | {CONFIG_VARIABLE}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"settings: {name} in the environment is not a setting{hint}")


def _read_toml(config: Path | None) -> dict[str, Any]:
    """Read the TOML file: given, named by the environment, or ``impasto.toml`` here. A named one must exist."""
    named = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    path = named or DEFAULT_CONFIG
    if named is None and not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"settings: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"settings: {path} is not TOML: {error}") from None
