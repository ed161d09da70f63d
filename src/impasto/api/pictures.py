"""One picture of a request: from the text in the body to a PNG of our own making.

Knows the text, the words for "wrong", how many pictures may be in memory at once, and how one is fetched whose address
was given. Knows nothing of jobs. The imaging library is loaded with the first picture, so that the service starts
without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from anyio import CapacityLimiter, to_thread

from impasto.api.room import ROOM
from impasto.config import Settings
from impasto.errors import InvalidInput, MediaError, NotFound
from impasto.fetch.addresses import Policy
from impasto.fetch.allowed import Hosts
from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.jobs.outputs import LORA_TYPE, OutputStore
from impasto.jobs.uploads import Upload, UploadStore

FETCH_SECONDS: Final = 10.0  # for one picture
FETCHES: Final = 8  # at once; more wait their turn without a thread
_URL: Final = re.compile(r"\s*https?:", re.IGNORECASE)
_OUTPUT: Final = re.compile(r"(?:https?://[^?#]*)?/outputs/(?P<blob>[0-9a-f]{32}/[\w-]+/\w+\.\w+)(?:[?#].*)?")
_UPLOAD: Final = re.compile(r"(?:https?://[^?#]*)?/uploads/(?P<id>[0-9a-f]{32})\.\w+(?:[?#].*)?")
_REMEDY: Final = "send the picture itself as a data URI or base64"


@dataclass(frozen=True, slots=True)
class PictureAt:
    """A picture that was given by its address.

    Attributes:
        url: Where it is.
        field: The request field that named it.
        mask: Whether it is a mask.
    """

    url: str
    field: str
    mask: bool = False

    @classmethod
    def of(cls, text: str, field: str, *, mask: bool = False) -> PictureAt | None:
        """Return the address in ``text``, or ``None`` if it is the picture itself."""
        url = text.strip()
        address = _URL.match(url) or _OUTPUT.fullmatch(url) or _UPLOAD.fullmatch(url)
        return cls(url, field, mask) if address else None


class PictureSource:
    """Where pictures come from that were given by their address: this service's own files, and other hosts.

    Args:
        outputs: Finished pictures; their addresses are read from here, whatever host they name.
        client: Fetches; without it nothing is.
        uploads: Uploaded ones; theirs are, too.
    """

    def __init__(self, outputs: OutputStore, client: Client | None, uploads: UploadStore | None = None) -> None:
        self._outputs = outputs
        self._client = client
        self._uploads = uploads
        self._limiter = CapacityLimiter(FETCHES)

    @classmethod
    def of(cls, settings: Settings, outputs: OutputStore, uploads: UploadStore | None = None) -> PictureSource:
        """Build the source that the settings describe."""
        policy = Policy.of(
            settings.fetch_allow,
            allow_http=settings.fetch_http,
            ports=settings.fetch_ports,
            only=Hosts.of(settings.fetch_hosts, "fetch_hosts"),
        )
        return cls(outputs, None if settings.offline else Client(policy), uploads)

    async def fetched(self, pictures: Mapping[str, bytes | PictureAt]) -> dict[str, bytes]:
        """Return every picture as PNG, those that were given by their address fetched.

        Slow hosts take threads of their own, so that the service's other requests do not wait for them.

        Raises:
            InvalidInput: One cannot be fetched or is no picture; ``field`` names it.
        """
        return {name: await self._png(picture) for name, picture in pictures.items()}

    async def _png(self, picture: bytes | PictureAt) -> bytes:
        if isinstance(picture, bytes):
            return picture
        return await to_thread.run_sync(self.read, picture, limiter=self._limiter)

    def read(self, picture: PictureAt) -> bytes:
        """Fetch one picture and return it as PNG.

        Raises:
            InvalidInput: It cannot be fetched or is no picture.
        """
        data = self._own(picture)
        return _png(self._fetch(picture) if data is None else data, picture.field, picture.mask)

    def _own(self, picture: PictureAt) -> bytes | None:
        """Read a picture of this service; its name is the secret, so whoever has it may."""
        try:
            if match := _OUTPUT.fullmatch(picture.url):
                return self._outputs.get(match["blob"])
            if self._uploads and (match := _UPLOAD.fullmatch(picture.url)):
                return self._uploaded(self._uploads.find(match["id"]), picture.field)
        except NotFound:
            pass
        return None

    def _uploaded(self, upload: Upload, field: str) -> bytes:
        if upload.content_type == LORA_TYPE:
            raise InvalidInput(field, "is an uploaded LoRA, which has no picture: name it in loras")
        return self._outputs.get_upload(upload.blob)

    def _fetch(self, picture: PictureAt) -> bytes:
        from impasto.images import MAX_INPUT_BYTES

        if self._client is None:
            raise MediaError(picture.field, f"is a URL, and this server fetches nothing: {_REMEDY}")
        try:
            with self._client.open(picture.url, Clock(FETCH_SECONDS), max_bytes=MAX_INPUT_BYTES) as answer:
                if answer.status != 200:
                    raise answer.failure()
                return answer.read()
        except FetchFailed as failure:
            ours = _OUTPUT.fullmatch(picture.url) or _UPLOAD.fullmatch(picture.url)
            gone = " (this service has no such file any more)" if ours else ""
            raise MediaError(picture.field, f"is a URL that {failure}{gone}; or {_REMEDY}") from None


def to_png(text: str, path: str) -> bytes:
    """Check a start picture, given as a data URI or base64, and return it as PNG.

    Raises:
        InvalidInput: It is none, or too large; ``path`` is its field.
    """
    return _given(text, path, mask=False)


def to_mask_png(text: str, path: str) -> bytes:
    """Do the same for a mask, and return it as PNG of 8-bit grey: white is painted, black is kept."""
    return _given(text, path, mask=True)


def stand_in(text: str) -> str:
    """Return what to remember of a picture's text: how it began and how long it was, never the picture."""
    return f"{text[:32]}… ({len(text)} characters)" if text else ""


def _given(text: str, path: str, *, mask: bool) -> bytes:
    from impasto.images import decode_payload

    return _png(decode_payload(text, path), path, mask)


def _png(data: bytes, path: str, mask: bool) -> bytes:
    """Read a picture's file and encode it anew."""
    from impasto.images import encode_png, mask_of, read_picture

    with ROOM.taken(data, path):
        image = read_picture(data, path)
        return encode_png(mask_of(image) if mask else image)
