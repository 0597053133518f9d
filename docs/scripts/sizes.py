"""Measures what an installation of this package fetches: asks the package index, and downloads only tables of contents.

    python docs/scripts/sizes.py                          # the library: megabytes to download, megabytes unpacked
    python docs/scripts/sizes.py ".[test,examples]"       # what make installs
    python docs/scripts/sizes.py . torch==2.13.0 --find-links FOLDER     # with wheels of your own; options are pip's

Python's byte code comes on top, about 0.3 GB.
"""

import io
import json
import subprocess
import sys
import zipfile
from urllib.request import Request, url2pathname, urlopen

from titans_pytorch.training.options import OneLineParser

BLOCK = 1 << 18


class Remote(io.RawIOBase):
    """A file at an address, read in parts."""

    def __init__(self, url: str):
        self.url, self.position = url, 0
        with urlopen(Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        last = min(self.position + len(buffer), self.size) - 1
        if last < self.position:
            return 0
        with urlopen(Request(self.url, headers={"Range": f"bytes={self.position}-{last}"})) as answer:
            part = answer.read()
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def sizes(url: str) -> tuple[int, int]:
    """Return the bytes of a wheel, packed and unpacked."""
    raw = io.FileIO(url2pathname(url[7:])) if url.startswith("file:") else Remote(url)
    with io.BufferedReader(raw, BLOCK) as file, zipfile.ZipFile(file) as wheel:
        return file.seek(0, io.SEEK_END), sum(member.file_size for member in wheel.infolist())


def main(argv: list[str] | None = None) -> int:
    _, words = OneLineParser(description=__doc__).parse_known_args(argv)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    run = subprocess.run([*pip, *(words or ["."])], stdout=subprocess.PIPE, check=True)
    wheels = [item for item in json.loads(run.stdout)["install"] if item["download_info"]["url"].endswith(".whl")]
    found = {item["metadata"]["name"]: sizes(item["download_info"]["url"]) for item in wheels}
    for name, (packed, unpacked) in sorted(found.items(), key=lambda item: item[1])[-12:]:
        print(f"{packed / 1e6:8.0f} MB {unpacked / 1e6:8.0f} MB  {name}")
    packed, unpacked = (sum(column) for column in zip(*found.values(), strict=True))
    print(f"{packed / 1e6:8.0f} MB {unpacked / 1e6:8.0f} MB  {len(found)} packages")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
