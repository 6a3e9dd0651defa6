"""Images of a chat request: from the URL of a content part to patches, and into the prompt."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from ..common.checkpoint.checkpoint import Checkpoint
from ..common.checkpoint.tokenizer import Tokenizer
from ..common.errors import CheckpointError, RequestError
from ..common.images.patches import Patches, open_picture, tokens_of
from ..common.images.preparation import Preparation, read_preparation
from ..common.messages import Image, Ready
from ..platforms.interface import ImageInput
from .errors import ApiError, bad_request

FETCH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Pieces:
    """An image as a prompt has it: patches, each a run of placeholders, and tokens of words."""

    each: tuple[Patches | int, ...]
    merge: int

    @property
    def tokens(self) -> int:
        return sum(1 if isinstance(p, int) else tokens_of(p.grid, self.merge) for p in self.each)


@dataclass(frozen=True, slots=True)
class ImageReader:
    """What a server that takes images reads them with. `words`: token ids of what stands between an
    image's patches. `fetch`: also from http and https."""

    preparation: Preparation
    words: Mapping[str, int]
    taken: ImageInput
    max_context: int
    max_bytes: int  # of one file
    fetch: bool = False

    async def read(self, url: str, param: str, before: int) -> Pieces:
        """`before`: tokens of the images before it. Raises RequestError or ApiError 400 that names
        `param`."""
        data = await self._bytes(url, param)
        return await asyncio.to_thread(self.cut, data, param, before)

    def cut(self, data: bytes, param: str, before: int) -> Pieces:
        """The same from a file's bytes."""
        try:
            return self._cut(data, before)
        except RequestError as error:
            error.param = param
            raise

    def _cut(self, data: bytes, before: int) -> Pieces:
        picture = open_picture(data)
        tokens = self.preparation.tokens(picture)
        if before + tokens >= self.max_context:  # before it takes memory
            others = f", those before it {before}" if before else ""
            raise RequestError(
                f"The image takes {tokens} tokens{others}; this model's maximum context length is "
                f"{self.max_context}. Send smaller images, or fewer.",
                None,
                "context_length_exceeded",
            )
        pieces = self.preparation.pieces(picture)
        found = (self.words[piece] if isinstance(piece, str) else piece for piece in pieces)
        return Pieces(tuple(found), self.taken.merge)

    async def _bytes(self, url: str, param: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(from_data_url, url, param)
        if scheme not in ("http", "https"):
            raise bad_request(
                f"{param}: the URL of an image must begin with data:, not {url[:20]!r}.",
                param,
                "invalid_image_url",
            )
        if not self.fetch:
            raise bad_request(
                f"{param}: this server fetches no images. Send the file itself as a data: URL "
                "(data:image/png;base64,...), or start the server with --fetch-images.",
                param,
                "image_url_not_allowed",
            )
        return await self._fetched(url, param)

    async def _fetched(self, url: str, param: str) -> bytes:
        """Follows no redirect: the URL that the client named is the one that is read."""
        import httpx

        data = bytearray()
        try:
            async with (
                httpx.AsyncClient(timeout=FETCH_SECONDS, trust_env=False) as client,
                client.stream("GET", url) as response,
            ):
                if response.status_code != 200:
                    raise _unfetched(param, f"the answer was {response.status_code}")
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > self.max_bytes:
                        raise _unfetched(param, f"it is larger than {self.max_bytes} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unfetched(param, str(error) or type(error).__name__) from None
        return bytes(data)


def from_data_url(url: str, param: str) -> bytes:
    """RFC 2397, base64 alone: percent-encoded binary is three times as long."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(
            f"{param}: a data: URL must have the form data:image/png;base64,...",
            param,
            "invalid_image_url",
        )
    try:
        return base64.b64decode(unquote_to_bytes(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{param}: the data: URL is not valid base64 ({error}).", param, "invalid_image_url"
        ) from None


def _unfetched(param: str, why: str) -> ApiError:
    return bad_request(f"{param}: the image could not be fetched: {why}.", param, "invalid_image")


@dataclass(frozen=True, slots=True)
class NoImages:
    """A server, or an LLM, that takes none."""

    reason: str


def open_reader(
    checkpoint: Checkpoint, tokenizer: Tokenizer, ready: Ready, max_bytes: int, fetch: bool
) -> ImageReader | NoImages:
    """A checkpoint that does not say how images are prepared, or says it otherwise than its model
    reads them, serves text: every image is refused with the reason."""
    taken = ready.images
    if taken is None:
        said = ready.features.get("images", ["", "The platform takes no images."])
        return NoImages(said[1])
    try:
        preparation = read_preparation(checkpoint.path)
    except CheckpointError as error:
        return NoImages(str(error))
    pixels = preparation.pixels
    values = 3 * pixels.frames * pixels.patch**2
    if (pixels.merge, values) != (taken.merge, taken.patch_values):
        return NoImages(
            f"{checkpoint.path}: images are prepared in patches of {values} numbers, merged "
            f"{pixels.merge} x {pixels.merge}; the model reads patches of "
            f"{taken.patch_values}, merged {taken.merge} x {taken.merge}."
        )
    words = {word: tokenizer.encode(word, add_special_tokens=False) for word in preparation.words}
    several = [word for word, ids in words.items() if len(ids) != 1]
    if several:
        return NoImages(
            f"{checkpoint.path}: images need {', '.join(several)} between their parts, and the "
            "vocabulary has no token for it."
        )
    ids = {word: found[0] for word, found in words.items()}
    return ImageReader(preparation, ids, taken, ready.max_context, max_bytes, fetch)


def place(
    ids: Sequence[int], images: Sequence[Pieces], taken: ImageInput
) -> tuple[list[int], list[Image]]:
    """Each placeholder of a rendered prompt becomes the pieces of its image. Raises RequestError
    when placeholders and images are not as many."""
    found = sum(1 for token in ids if token == taken.token_id)
    if found != len(images):
        raise RequestError(
            f"The prompt has {found} image placeholder(s) for {len(images)} image(s): texts must "
            "not spell the placeholder, and the model's chat template must place every image.",
            "messages",
            "image_placeholders",
        )
    prompt: list[int] = []
    placed: list[Image] = []
    left = iter(images)
    for token in ids:
        if token != taken.token_id:
            prompt.append(token)
            continue
        for piece in next(left).each:
            if isinstance(piece, int):
                prompt.append(piece)
                continue
            placed.append(Image(len(prompt), piece.grid, piece.values.tobytes(), piece.digest))
            prompt += [token] * tokens_of(piece.grid, taken.merge)
    return prompt, placed
