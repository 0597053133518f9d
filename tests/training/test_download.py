import hashlib
import http.server
import socket
import threading

import pytest

from titans_pytorch.training import download as download_module
from titans_pytorch.training.download import Unreachable, download, download_enwik8
from titans_pytorch.training.errors import TrainingError

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        body = {"/half": CONTENT[:100_000], "/changed": CONTENT[::-1], "/page": b"<html>"}.get(self.path, CONTENT)
        self.send_response(200)
        if self.path != "/nolength":
            said = {"/page": len(body), "/words": "abc", "/negative": -1, "/huge": "9" * 5000}
            self.send_header("Content-Length", str(said.get(self.path, len(CONTENT))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def fetch(url, tmp_path):
    return download(url, tmp_path / "made" / "f.zip", len(CONTENT), SHA256)


def leftovers(tmp_path):
    return [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("page", ["whole", "nolength"])
def test_a_whole_download(server, tmp_path, page, capsys):
    target = fetch(f"{server}/{page}", tmp_path)
    assert target.read_bytes() == CONTENT
    assert leftovers(tmp_path) == [target]
    assert page in capsys.readouterr().err  # the progress bar


def test_enwik8_is_asked_for_by_its_published_size_and_hash(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "ENWIK8_URL", f"{server}/whole")
    with pytest.raises(Unreachable, match="answers with 256000 bytes, not 36445475"):
        download_enwik8(tmp_path / "enwik8.zip")
    monkeypatch.setattr(download_module, "ENWIK8_ZIP_BYTES", len(CONTENT))
    with pytest.raises(TrainingError, match="not 547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"):
        download_enwik8(tmp_path / "enwik8.zip")
    assert leftovers(tmp_path) == []


def test_a_download_that_is_cut_off(server, tmp_path):
    with pytest.raises(TrainingError, match="ended after 100000 of 256000 bytes; nothing was kept"):
        fetch(f"{server}/half", tmp_path)
    assert leftovers(tmp_path) == []


def test_other_bytes(server, tmp_path):
    with pytest.raises(TrainingError, match="has sha256"):
        fetch(f"{server}/changed", tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("page", ["missing", "page", "words", "negative", "huge"])
def test_a_server_without_the_file(server, tmp_path, page):
    with pytest.raises(Unreachable):
        fetch(f"{server}/{page}", tmp_path)
    assert leftovers(tmp_path) == []


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unreachable):
        fetch(f"http://127.0.0.1:{port}/f", tmp_path)


def test_a_server_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "SECONDS_TO_ANSWER", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(Unreachable, match=r"no answer|timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/f", tmp_path)
