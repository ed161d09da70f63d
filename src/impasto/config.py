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
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from impasto.errors import ConfigError
from impasto.types import LIMITS, REFINE_MODES, SCHEDULERS

PREFIX = "IMPASTO_"
CONFIG_VARIABLE = "IMPASTO_CONFIG"  # names the TOML file
DEFAULT_CONFIG = Path("impasto.toml")
GENERATE_TABLE = "generate"  # TOML table of ``impasto generate``; the service's settings stand at the top level

_FORMAT = "(auto|float32|bfloat16|float16)"
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
    accel: str = Field("", description="Faster ways to run, such as compile,channels_last,offload=encoders.")

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
    host: str = Field("127.0.0.1", description="Address the API listens on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on; 0 takes a free one.")
    public_url: str | None = Field(
        None, pattern=r"^https?://", description="Base of the URLs in answers. Unset: the host the client called."
    )
    max_body_bytes: int = Field(32 * 2**20, gt=0, description="Largest request body taken, in bytes.")
    max_queued: int = Field(1000, gt=0, description="Jobs one key may have waiting; beyond it submits get 429.")
    sync_timeout: float = Field(90, gt=0, description="Seconds a synchronous request is held before it turns async.")
    lease_seconds: float = Field(30, gt=0, description="A worker silent for this long loses its jobs to another.")
    max_attempts: int = Field(3, ge=1, description="Times a job is started before it is given up.")
    fake_step_seconds: float = Field(0.02, ge=0, description="How long a step of the model 'fake' takes, in seconds.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")
    offline: bool = Field(False, description="Fetch nothing from other hosts for requests: no LoRAs, no pictures.")
    fetch_allow: Annotated[list[str], NoDecode] = Field(
        [], description="Hosts and address blocks that are fetched from though they are not public, such as 10.0.0.0/8."
    )
    fetch_http: bool = Field(False, description="Fetch from plain http addresses, too.")
    fetch_ports: Annotated[list[int], NoDecode] = Field([80, 443], description="Ports that are fetched from.")
    fetch_seconds: float = Field(600, gt=0, description="Longest time for one LoRA's download, in seconds.")
    fetch_revalidate: float = Field(300, ge=0, description="Seconds until a site is asked again for what it has.")
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

    @field_validator("fetch_allow", "fetch_ports", "hf_token_repos", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        """Read ``a,b`` from the environment."""
        return _parts(value) if isinstance(value, str) else value

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
        """Where pictures are kept: a folder, as a path."""
        return str(self.data_dir.resolve() / "outputs")

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
    image: Path | None = Field(None, description="Start picture: PNG, JPEG or WebP.")
    mask: Path | None = Field(None, description="Where to paint in the start picture: white is painted, black kept.")
    strength: float = Field(LIMITS.strength.default, description="How far from the start picture, up to 1.")
    refine: str = Field(REFINE_MODES[0], description=f"Use of the refiner: {', '.join(REFINE_MODES)}.")
    high_noise_frac: float = Field(
        LIMITS.high_noise_frac.default, description="Share of the noise schedule before the refiner takes over."
    )
    refine_steps: int | None = Field(None, description="Steps of the second pass's schedule. Unset: as the base's.")
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
