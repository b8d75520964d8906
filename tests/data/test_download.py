"""Fetching over HTTP from a local server: resumed, checked, retried, refused."""

import gzip
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from collections import Counter, namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_scm.data import download
from pyro_scm.data.download import CATALOGUE, RemoteFile, Source, get, unpack
from pyro_scm.errors import DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
TABLE = gzip.compress(b"sig_id\tpert_id\nS1\tP1\n")
SUMS = "/suppl/SHA512SUMS.txt.gz"


class Server(ThreadingHTTPServer):
    """Serves `files`, and misbehaves as its attributes say."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # answer Range requests
        self.cuts: list[int] = []  # bytes after which the next answers break off
        self.errors: list[int] = []  # status of the next answers
        self.lengths = True  # say how long the answer is
        self.requests: list[tuple[str, str | None]] = []  # path and Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.requests.append((self.path, wanted))
        status = server.errors.pop(0) if server.errors else 200
        if status != 200 or self.path not in server.files:
            self.send_error(status if status != 200 else 404)
            return
        body = server.files[self.path]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start : start + cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def source(server: Server, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A matrix and a table with a SHA-512 list, as GEO has them."""
    server.files = {"/suppl/matrix.gctx.gz": CONTENT, "/suppl/sig_info.txt.gz": TABLE}
    lines = [f"{hashlib.sha512(body).hexdigest()}  {path.rsplit('/')[-1]}" for path, body in server.files.items()]
    server.files[SUMS] = gzip.compress("\n".join([*lines, ""]).encode())
    files = tuple(RemoteFile(f"{server.url}/suppl/{name}", name) for name in ("sig_info.txt.gz", "matrix.gctx.gz"))
    made = Source("toy", "a toy", files, server.url + SUMS)
    monkeypatch.setitem(CATALOGUE, "toy", made)
    return made


def fetch(folder: Path, name: str = "toy", **options: Any) -> list[Path]:
    """`get` without a progress bar, a proxy or a pause."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    options = {"progress": False, "pause": 0.0} | options
    return get(name, folder, opener=lambda request: opener.open(request, timeout=5), **options)


def _one(monkeypatch: pytest.MonkeyPatch, server: Server, sha256: str | None = None, size: int | None = None) -> None:
    """A source of one file without a checksum list."""
    server.files = {"/matrix": CONTENT}
    file = RemoteFile(f"{server.url}/matrix", "matrix", size, sha256)
    monkeypatch.setitem(CATALOGUE, "toy", Source("toy", "a toy", (file,)))


# ----------------------------------------------------------------------------------------------------- what goes right


def test_files_arrive_whole_under_their_names(source: Source, server: Server, tmp_path: Path) -> None:
    paths = fetch(tmp_path / "new" / "folder")
    assert [p.name for p in paths] == ["sig_info.txt.gz", "matrix.gctx.gz"]
    assert [p.read_bytes() for p in paths] == [TABLE, CONTENT]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [
        "SHA512SUMS.txt.gz",
        "matrix.gctx.gz",
        "sig_info.txt.gz",
    ]
    assert Counter(path for path, _ in server.requests).most_common(1)[0][1] == 1


def test_what_is_there_is_not_sent_again(source: Source, server: Server, tmp_path: Path) -> None:
    first = fetch(tmp_path)
    server.requests.clear()
    assert fetch(tmp_path) == first
    assert server.requests == []
    first[0].unlink()
    fetch(tmp_path)
    assert server.requests == [("/suppl/sig_info.txt.gz", None)]


def test_only_what_matches_is_fetched(source: Source, server: Server, tmp_path: Path) -> None:
    paths = fetch(tmp_path, match="*info*")
    assert [p.name for p in paths] == ["sig_info.txt.gz"]
    assert not (tmp_path / "matrix.gctx.gz").exists()


def test_a_broken_connection_is_taken_up_where_it_broke(source: Source, server: Server, tmp_path: Path) -> None:
    server.cuts = [10**6, 10**6, 100_000, 50_000]  # the list and the table arrive, the matrix breaks off twice
    paths = fetch(tmp_path)
    assert paths[1].read_bytes() == CONTENT
    ranges = [wanted for path, wanted in server.requests if path == "/suppl/matrix.gctx.gz"]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_part_left_by_an_earlier_run_is_continued(source: Source, server: Server, tmp_path: Path) -> None:
    (tmp_path / "matrix.gctx.gz.part").write_bytes(CONTENT[:123_456])
    assert fetch(tmp_path)[1].read_bytes() == CONTENT
    assert ("/suppl/matrix.gctx.gz", "bytes=123456-") in server.requests
    assert not (tmp_path / "matrix.gctx.gz.part").exists()


def test_a_server_without_ranges_sends_it_from_the_start(source: Source, server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "matrix.gctx.gz.part").write_bytes(b"x" * 123_456)  # would fail the checksum if it were kept
    assert fetch(tmp_path)[1].read_bytes() == CONTENT


def test_a_part_that_is_complete_or_too_long(source: Source, server: Server, tmp_path: Path) -> None:
    part = tmp_path / "matrix.gctx.gz.part"
    part.write_bytes(CONTENT)
    assert fetch(tmp_path)[1].read_bytes() == CONTENT
    (tmp_path / "matrix.gctx.gz").unlink()
    part.write_bytes(CONTENT + b"more")
    assert fetch(tmp_path)[1].read_bytes() == CONTENT
    assert [wanted for path, wanted in server.requests if path == "/suppl/matrix.gctx.gz"][-2:] == [
        "bytes=300004-",
        None,
    ]


def test_a_busy_server_is_asked_again_after_growing_pauses(
    source: Source, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.errors = [503, 429, 500]
    assert fetch(tmp_path, pause=0.5)[1].read_bytes() == CONTENT
    assert pauses == [0.5, 1.0, 2.0]


def test_an_answer_without_a_length_is_taken_as_it_comes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one(monkeypatch, server, sha256=hashlib.sha256(CONTENT).hexdigest())
    server.lengths = False
    assert fetch(tmp_path)[0].read_bytes() == CONTENT


def test_the_default_opener_does_not_wait_for_ever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one(monkeypatch, server)
    waits: list[float] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def urlopen(request: urllib.request.Request, timeout: float) -> Any:
        waits.append(timeout)
        return opener.open(request, timeout=5)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert get("toy", tmp_path, progress=False)[0].read_bytes() == CONTENT
    assert waits == [download.TIMEOUT]


def test_the_progress_bar_counts_the_bytes(
    source: Source, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "matrix.gctx.gz.part").write_bytes(CONTENT[:200_000])
    fetch(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "matrix.gctx.gz: 100%" in shown
    assert "300k/300k" in shown
    assert "SHA512SUMS" not in shown


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_file_that_does_not_exist_is_an_error_at_once(source: Source, server: Server, tmp_path: Path) -> None:
    del server.files["/suppl/matrix.gctx.gz"]
    message = r"http://127.0.0.1:\d+/suppl/matrix.gctx.gz: the server answers 404 \(Not Found\): if the file has moved"
    with pytest.raises(DataError, match=message):
        fetch(tmp_path)
    assert len([path for path, _ in server.requests if "matrix" in path]) == 1
    assert (tmp_path / "sig_info.txt.gz").read_bytes() == TABLE  # what came before it stays


def test_a_server_that_never_recovers_is_given_up(source: Source, server: Server, tmp_path: Path) -> None:
    fetch(tmp_path, match="*info*")
    server.errors = [503] * 100
    (tmp_path / "matrix.gctx.gz.part").write_bytes(CONTENT[:1000])
    message = r"matrix.gctx.gz: gave up after 5 attempts without progress \(.*503.*\): .* 1000 bytes in .*part are kept"
    with pytest.raises(DataError, match=message):
        fetch(tmp_path)
    assert (tmp_path / "matrix.gctx.gz.part").read_bytes() == CONTENT[:1000]


def test_a_connection_that_breaks_without_progress_is_given_up(source: Source, server: Server, tmp_path: Path) -> None:
    fetch(tmp_path, match="*info*")
    server.requests.clear()
    server.ranges, server.cuts = False, [1000] * 100
    with pytest.raises(DataError, match=r"gave up after 5 attempts without progress \(the connection closed early\)"):
        fetch(tmp_path)
    assert len(server.requests) == 6  # the first brought 1000 bytes, five more brought nothing new


def test_a_server_that_is_not_there(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one(monkeypatch, server)

    def refuse(request: urllib.request.Request) -> Any:
        raise urllib.error.URLError(ConnectionRefusedError("connection refused"))

    with pytest.raises(DataError, match=r"/matrix: gave up after 5 attempts .*connection refused"):
        get("toy", tmp_path, progress=False, opener=refuse, pause=0.0)


def test_a_wrong_checksum_deletes_what_arrived(source: Source, server: Server, tmp_path: Path) -> None:
    server.files["/suppl/matrix.gctx.gz"] = CONTENT[:-1] + b"?"
    message = r"matrix.gctx.gz arrived with a wrong checksum \(sha512 [0-9a-f]{16}..., expected [0-9a-f]{16}.*run again"
    with pytest.raises(DataError, match=message):
        fetch(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA512SUMS.txt.gz", "sig_info.txt.gz"]


def test_a_sha256_of_the_catalogue_is_checked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one(monkeypatch, server, sha256="0" * 64)
    with pytest.raises(DataError, match=r"wrong checksum \(sha256 .*expected 0000000000000000"):
        fetch(tmp_path)
    _one(monkeypatch, server, sha256=hashlib.sha256(CONTENT).hexdigest().upper())
    assert fetch(tmp_path)[0].read_bytes() == CONTENT


def test_a_file_that_was_damaged_later_is_named(source: Source, tmp_path: Path) -> None:
    matrix = fetch(tmp_path)[1]
    matrix.write_bytes(CONTENT[:-5])
    with pytest.raises(
        DataError, match=r"matrix.gctx.gz is not what http.* has published \(sha512 .*delete it and run"
    ):
        fetch(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no sums", gzip.compress(b"abc123  matrix.gctx.gz\n"), b" ", b"\x1f\x8bbroken"],
    ids=["text", "gzip", "blank", "broken gzip"],  # what gzip writes holds the time of day
)
def test_a_checksum_list_that_is_none(source: Source, server: Server, tmp_path: Path, content: bytes) -> None:
    server.files[SUMS] = content
    with pytest.raises(DataError, match=r"SHA512SUMS.txt.gz \(from http.*\) is no list of SHA-512 sums .*: delete it"):
        fetch(tmp_path)


def test_a_full_disk_is_seen_before_anything_is_sent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 10**5, 10**5))
    _one(monkeypatch, server, size=3 * 10**9)
    with pytest.raises(DataError, match=r"toy needs 3.00 GB in .*, where 0.00 GB are free: make room or name another"):
        fetch(tmp_path)
    assert server.requests == []
    _one(monkeypatch, server)  # unknown size: the server's own figure counts
    with pytest.raises(DataError, match=r"/matrix needs 0.00 GB in"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "matrix.part").write_bytes(CONTENT[:250_000])  # only the rest needs room
    assert fetch(tmp_path)[0].read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"folder .*file.sub cannot be made .*: name another one"):
        fetch(tmp_path / "file" / "sub")


def test_a_file_that_cannot_be_written(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def denied(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.name == "matrix.gctx.gz.part" and mode == "wb":
            raise PermissionError(13, "Permission denied")
        return original(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    message = r"matrix.gctx.gz.part cannot be written \(.*Permission denied\): free some space or name another folder"
    with pytest.raises(DataError, match=message):
        fetch(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file that is always full")
def test_a_disk_that_fills_up_on_the_way(source: Source, server: Server, tmp_path: Path) -> None:
    (tmp_path / "matrix.gctx.gz.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"matrix.gctx.gz.part cannot be written \(.*No space left on device\)"):
        fetch(tmp_path)
    assert len([path for path, _ in server.requests if "matrix" in path]) == 1  # trying again would not help


def test_an_error_while_a_file_arrives_is_tried_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one(monkeypatch, server)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    failures = [ConnectionResetError("reset by peer"), http.client.IncompleteRead(b""), TimeoutError()]

    def flaky(request: urllib.request.Request) -> Any:
        response = opener.open(request, timeout=5)
        original, calls = response.read, []

        def read(size: int) -> bytes:
            calls.append(size)
            if failures and len(calls) == 2:
                raise failures.pop()
            return bytes(original(50_000))

        response.read = read
        return response

    assert get("toy", tmp_path, progress=False, opener=flaky, pause=0.0)[0].read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=50000-", "bytes=100000-", "bytes=150000-"]


def test_unknown_names_and_patterns_list_what_there_is(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set 'l1000': there are 'l1000-phase1', 'l1000-phase2', 'toy'"):
        fetch(tmp_path, "l1000")
    with pytest.raises(DataError, match=r"toy: no file matches '\*level4\*': there are 'sig_info.txt.gz', 'matrix"):
        fetch(tmp_path, match="*level4*")


# ------------------------------------------------------------------------------------------------- catalogue and gunzip


@pytest.mark.parametrize(("name", "series"), [("l1000-phase1", "GSE92742"), ("l1000-phase2", "GSE70138")])
def test_the_catalogue_has_both_phases_at_geo(name: str, series: str) -> None:
    source = CATALOGUE[name]
    folder = f"https://ftp.ncbi.nlm.nih.gov/geo/series/{series[:5]}nnn/{series}/suppl/"
    assert source.name == name
    assert series in source.description
    assert source.sha512sums == f"{folder}{series}_SHA512SUMS.txt.gz"
    names = [file.name for file in source.files]
    assert all(file.url == folder + file.name for file in source.files)
    for part in ("Level3", "Level5", "sig_info", "inst_info", "pert_info", "cell_info", "gene_info"):
        assert sum(part in name for name in names) == 1, part
    assert names[-1].startswith(f"{series}_Broad_LINCS_Level3_INF_mlr12k_n")  # the largest last


def test_unpack_writes_the_plain_file_beside(tmp_path: Path) -> None:
    packed = tmp_path / "matrix.gctx.gz"
    packed.write_bytes(gzip.compress(CONTENT))
    plain = unpack(packed)
    assert plain == tmp_path / "matrix.gctx"
    assert plain.read_bytes() == CONTENT
    assert packed.exists()
    plain.write_bytes(b"kept")
    assert unpack(packed).read_bytes() == b"kept"
    with pytest.raises(DataError, match=r"matrix.gctx is not called \*.gz: there is nothing to unpack"):
        unpack(plain)
    with pytest.raises(DataError, match=r"there is no file .*absent.gz"):
        unpack(tmp_path / "absent.gz")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-100], lambda raw: b"not gzip", lambda raw: raw[:99] + b"?" + raw[100:]]
)
def test_unpack_leaves_nothing_of_a_damaged_file(tmp_path: Path, damage: Any) -> None:
    packed = tmp_path / "matrix.gctx.gz"
    packed.write_bytes(damage(gzip.compress(CONTENT)))
    with pytest.raises(
        DataError, match=r"matrix.gctx.gz cannot be unpacked .*: if it is damaged, delete and get it again"
    ):
        unpack(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.gctx.gz"]
