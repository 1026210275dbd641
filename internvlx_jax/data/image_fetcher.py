"""Images behind URLs, asked for side by side before they are decoded (design: data.md 17).

A loader asks for all images of a step at once, while the steps before it are decoded. What comes is
taken in the order of the plan, so that a batch does not depend on which request was faster.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from internvlx_jax.core.data_config import CacheConfig
from internvlx_jax.core.local_cache import LocalCache
from internvlx_jax.core.uploads import cache_folder
from internvlx_jax.data import storage
from internvlx_jax.data.conversations import Image
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.sources import JsonArray, JsonLines, Source

Place = tuple[int, int]  # dataset and position of a sample


class Ahead(NamedTuple):
    """What has been asked for.

    Attributes:
        images: content of each URL.
        records: of samples in remote ArrayRecord files.
    """

    images: Mapping[str, Future[bytes]]
    records: Mapping[Place, Future[Any]]


NOTHING = Ahead({}, {})
T = TypeVar("T")


class Fetched(NamedTuple):
    """Counts images behind URLs.

    Attributes:
        hits: read from the local disk.
        misses: fetched.
        bytes: that were fetched.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0

    def __add__(self, other: tuple) -> Fetched:  # type: ignore[override]
        """Returns the counts of both together."""
        return Fetched(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class FetchedImage:
    """An image that is on its way; it is the URL for messages."""

    def __init__(self, url: str, content: Future[bytes]):
        self._url, self._content = url, content

    def open(self) -> BinaryIO:
        """Returns the encoded file, once it has come; raises what the request has met."""
        return io.BytesIO(self._content.result())

    def __str__(self) -> str:
        return self._url


def open_cache(config: CacheConfig) -> LocalCache:
    """Returns the local cache of a run that starts now."""
    folder = Path(config.folder).expanduser() if config.folder else cache_folder()
    return LocalCache(folder, int(config.max_gb * 1e9), time.time())


class ImageFetcher:
    """Fetches images in threads. Workers hold a pickled copy, with threads and counts of its own.

    Args:
        cache: where copies lie.
        requests: images that are asked for at the same time.
    """

    def __init__(self, cache: LocalCache, requests: int):
        self._cache, self._requests = cache, requests
        self._lock, self._counts = threading.Lock(), Fetched()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict:
        return {"cache": self._cache, "requests": self._requests}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def ask(self, images: Sequence[Image]) -> dict[str, Future[bytes]]:
        """Asks for those images that lie behind URLs, each once."""
        urls = [image for image in images if isinstance(image, str) and is_remote_image(image)]
        return {url: self.submit(self._fetch, url) for url in dict.fromkeys(urls)}

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a request in a thread."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._requests, thread_name_prefix="images")
        return self._pool.submit(function, *arguments)

    def opened(self, images: Sequence[Image], ahead: Ahead) -> tuple[Image, ...]:
        """Returns the images of a sample, those behind URLs as `FetchedImage`."""
        texts = [image for image in images if isinstance(image, str)]
        missing = self.ask([text for text in texts if text not in ahead.images])

        def opened(image: Image) -> Any:
            content = None
            if isinstance(image, str):
                content = ahead.images.get(image) or missing.get(image)
            return image if content is None else FetchedImage(str(image), content)

        return tuple(opened(image) for image in images)

    def take_counts(self) -> Fetched:
        """Returns what was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Fetched()
        return counts

    def _fetch(self, url: str) -> bytes:
        content, hit = self._cache.fetch(url)
        with self._lock:
            self._counts += (1, 0, 0) if hit else (0, 1, len(content))
        return content


def is_remote_image(text: str) -> bool:
    """Returns whether a text names an image behind a URL; data: URLs and base64 hold theirs."""
    return storage.is_url(text[:64]) and text[:5].lower() != "data:"


def may_have_urls(source: Source, entry: DatasetEntry, position: int) -> bool:
    """Returns whether a record of a text file may name images behind URLs."""
    if not isinstance(source, JsonLines | JsonArray):
        return False
    return storage.is_url(entry.root) or b"://" in source.record(position)
