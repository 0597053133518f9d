"""enwik8: the first 100 million bytes of an English Wikipedia dump (CC BY-SA, GFDL)."""

import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_pytorch.common.files import replacing
from titans_pytorch.training.errors import TrainingError

__all__ = ["Unreachable", "download_enwik8"]

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ZIP_BYTES = 36_445_475
ENWIK8_ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SECONDS_TO_ANSWER = 6.0


class Unreachable(Exception):
    """The server did not respond, or responded with something else than the file."""


def download_enwik8(target: Path) -> Path:
    return download(ENWIK8_URL, target, ENWIK8_ZIP_BYTES, ENWIK8_ZIP_SHA256)


def download(url: str, target: Path, size: int, sha256: str) -> Path:
    """Download `url` to `target`, which appears only when it is complete and its hash is right.

    Raises Unreachable without a valid response within seconds, TrainingError if the download breaks off or the hash is
    wrong.
    """
    response = answer(url)
    with response:
        length = response.headers.get("Content-Length")
        if length is not None and length.strip() != str(size):
            raise Unreachable(f"{url} answers with {length[:40]} bytes, not {size}")
        with replacing(target) as part:
            got, digest = copy(response, part, size, url)
            if got != size:
                raise TrainingError(f"data: the download of {url} ended after {got} of {size} bytes; nothing was kept")
            if digest != sha256:
                raise TrainingError(f"data: {url} has sha256 {digest}, not {sha256}; nothing was kept")
    return target


def copy(response: Any, part: Path, size: int, url: str) -> tuple[int, str]:
    """Return the number of bytes received and their sha256; a broken connection ends the count."""
    digest, got = hashlib.sha256(), 0
    with part.open("wb") as out, tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
        while True:
            try:
                block = response.read(1 << 16)
            except (http.client.HTTPException, TimeoutError, ConnectionError):
                break
            if not block or got > size:
                break
            out.write(block)
            digest.update(block)
            got += len(block)
            bar.update(len(block))
    return got, digest.hexdigest()


def answer(url: str) -> Any:
    """Open `url` with a limit on everything up to the headers, name resolution (which has no timeout) included."""
    result: list[Any] = []

    def ask() -> None:
        try:
            result.append(urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER))
        except (OSError, http.client.HTTPException, ValueError) as error:
            result.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    if not result:
        raise Unreachable(f"no answer from {url} in {SECONDS_TO_ANSWER:g} s")
    if isinstance(result[0], Exception):
        reason = getattr(result[0], "reason", None) or result[0]
        raise Unreachable(f"{url}: {reason}")
    return result[0]
