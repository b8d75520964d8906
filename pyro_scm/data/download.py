"""Public data sets fetched into a folder: resumed after an interruption, checked against published checksums.

What has its final name in the folder is complete and checked; what is still arriving is called ``*.part``.
"""

import gzip
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from pyro_scm.errors import DataError, listing

__all__ = ["CATALOGUE", "RemoteFile", "Source", "get", "unpack"]

Opener = Callable[[urllib.request.Request], Any]

ATTEMPTS = 5  # in a row without a single new byte
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without an answer
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP errors that may go away by themselves


class RemoteFile(NamedTuple):
    """One file of a source: where it is, what it is called, and what is known about its content."""

    url: str
    name: str
    size: int | None = None  # bytes, only to look for room on the disk beforehand: the server's own figure counts
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set that can be fetched.

    Args:
        name: what `get` calls it.
        description: one line, with the reference.
        files: what it consists of.
        sha512sums: URL of a published list of SHA-512 sums ("DIGEST  NAME" lines, may be gzipped), used for the files
            it lists.
    """

    name: str
    description: str
    files: tuple[RemoteFile, ...]
    sha512sums: str | None = None


def _geo(name: str, description: str, series: str, files: dict[str, int | None]) -> Source:
    """Supplementary files of a GEO series, served over HTTPS, with the series' own checksum list."""
    folder = f"https://ftp.ncbi.nlm.nih.gov/geo/series/{series[:-3]}nnn/{series}/suppl"
    names = {f"{series}_Broad_LINCS_{file}.gz": size for file, size in files.items()}
    remote = tuple(RemoteFile(f"{folder}/{file}", file, size) for file, size in names.items())
    return Source(name, description, remote, f"{folder}/{series}_SHA512SUMS.txt.gz")


CATALOGUE: dict[str, Source] = {
    source.name: source
    for source in (
        _geo(
            "l1000-phase1",
            "LINCS L1000 phase I (GEO GSE92742; Subramanian et al. 2017): level 3 wells, level 5 signatures, metadata",
            "GSE92742",
            {
                "cell_info.txt": None,
                "gene_info.txt": None,
                "inst_info.txt": None,
                "pert_info.txt": None,
                "sig_info.txt": None,
                "Level5_COMPZ.MODZ_n473647x12328.gctx": 21_328_033_748,
                "Level3_INF_mlr12k_n1319138x12328.gctx": None,
            },
        ),
        _geo(
            "l1000-phase2",
            "LINCS L1000 phase II (GEO GSE70138, release of March 2017): level 3 wells, level 5 signatures, metadata",
            "GSE70138",
            {
                "cell_info_2017-04-28.txt": 2_528,
                "gene_info_2017-03-06.txt": 216_692,
                "inst_info_2017-03-06.txt": 4_783_200,
                "pert_info_2017-03-06.txt": 82_376,
                "sig_info_2017-03-06.txt": 1_943_865,
                "Level5_COMPZ_n118050x12328_2017-03-06.gctx": 5_365_179_698,
                "Level3_INF_mlr12k_n345976x12328_2017-03-06.gctx": None,
            },
        ),
    )
}


def _open(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def get(
    name: str,
    folder: str | Path,
    *,
    progress: bool = True,
    opener: Opener = _open,
    match: str = "*",
    pause: float = 1.0,
) -> list[Path]:
    """Fetch a source of `CATALOGUE`; what is there already is checked, not sent again.

    An interrupted file goes on where it stopped (HTTP Range), or from the start where the server cannot do that.

    Args:
        name: key of `CATALOGUE`.
        folder: where the files go; made if it does not exist.
        progress: show a bar per file.
        opener: opens a request, as `urllib.request.urlopen` does.
        match: pattern of the file names wanted (``"*info*"`` for the metadata tables without the matrices).
        pause: seconds before the second attempt; doubled before each further one.

    Returns:
        the files, in the order of the source.

    Raises:
        DataError: unknown source or pattern, too little disk space, a server that refuses or keeps failing, a checksum
            that does not match. Names the URL and what to do.
    """
    if name not in CATALOGUE:
        raise DataError(f"no data set {name!r}: there are {listing(CATALOGUE, 20)}")
    source, folder = CATALOGUE[name], Path(folder)
    files = [file for file in source.files if fnmatch(file.name, match)]
    if not files:
        raise DataError(f"{name}: no file matches {match!r}: there are {listing((f.name for f in source.files), 20)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be made ({error}): name another one") from error
    missing = [file for file in files if not (folder / file.name).exists()]
    parts = sum(_size(_part(folder / file.name)) for file in missing)
    _check_space(folder, sum(file.size or 0 for file in missing) - parts, source.name)
    fetch = _Fetch(opener, progress, pause)
    sums = _sha512sums(source, folder, fetch)
    return [_file(file, folder / file.name, sums.get(file.name), fetch) for file in files]


def unpack(path: str | Path) -> Path:
    """Unpack NAME.gz beside itself as NAME: a GCTX can be read in parts only when it is unpacked.

    Args:
        path: a gzipped file; it stays.

    Returns:
        the unpacked file. It is left alone if it exists.

    Raises:
        DataError: no such file, not gzip, damaged, or no room.
    """
    path = Path(path)
    if path.suffix != ".gz":
        raise DataError(f"{path} is not called *.gz: there is nothing to unpack")
    target = path.with_suffix("")
    if target.exists():
        return target
    part = _part(target)
    try:
        with gzip.open(path, "rb") as packed, part.open("wb") as out:
            shutil.copyfileobj(packed, out, CHUNK)
        os.replace(part, target)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}): if it is damaged, delete and get it again") from error
    finally:
        part.unlink(missing_ok=True)
    return target


class _Interrupted(Exception):
    """The connection broke while a file arrived."""


class _Fetch(NamedTuple):
    opener: Opener
    progress: bool
    pause: float


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: make room or name "
            "another folder"
        )


def _sha512sums(source: Source, folder: Path, fetch: _Fetch) -> dict[str, str]:
    """Digest of each file on the source's list; the list is kept in the folder: a later check needs no network."""
    if source.sha512sums is None:
        return {}
    name = source.sha512sums.rsplit("/", 1)[-1]
    raw = _file(RemoteFile(source.sha512sums, name), folder / name, None, fetch._replace(progress=False)).read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
        pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        sums = {path.lstrip("*").rsplit("/", 1)[-1].strip(): digest.lower() for digest, path in pairs}
        if not sums or not all(len(bytes.fromhex(digest)) == hashlib.sha512().digest_size for digest in sums.values()):
            raise ValueError("no SHA-512 sums in it")
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{folder / name} (from {source.sha512sums}) is no list of SHA-512 sums ({error}): delete it and run again"
        ) from error
    return sums


def _file(file: RemoteFile, path: Path, sha512: str | None, fetch: _Fetch) -> Path:
    """The file at `path`, fetched if it is not there, and checked."""
    if path.exists():
        wrong = _mismatch(path, file.sha256, sha512)
        if wrong:
            raise DataError(f"{path} is not what {file.url} has published ({wrong}): delete it and run again")
        return path
    part = _part(path)
    _transfer(file.url, part, fetch)
    wrong = _mismatch(part, file.sha256, sha512)
    if wrong:
        part.unlink()
        raise DataError(
            f"{file.url} arrived with a wrong checksum ({wrong}) and was deleted: run again; if it stays so, "
            "the published file has changed"
        )
    os.replace(part, path)
    return path


def _mismatch(path: Path, sha256: str | None, sha512: str | None) -> str | None:
    """What is wrong with the content, or None: also where nothing is known about it."""
    for kind, expected in (("sha256", sha256), ("sha512", sha512)):
        if expected is not None:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, kind).hexdigest()
            if found != expected.lower():
                return f"{kind} {found[:16]}..., expected {expected[:16]}..."
    return None


def _transfer(url: str, part: Path, fetch: _Fetch) -> None:
    """All of `url` in `part`: until it is complete, or `ATTEMPTS` attempts in a row have brought nothing new."""
    failures, furthest = 0, _size(part)
    while True:
        try:
            if _receive(url, part, fetch):
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _PASSING:
                raise DataError(
                    f"{url}: the server answers {error.code} ({error.reason}): if the file has moved, put it into "
                    f"{part.parent} by hand"
                ) from error
            reason = str(error)
        except (_Interrupted, OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures >= ATTEMPTS:
            raise DataError(
                f"{url}: gave up after {failures} attempts without progress ({reason}): check the connection and run "
                f"again; the {_size(part)} bytes in {part} are kept"
            )
        time.sleep(fetch.pause * 2.0 ** max(failures - 1, 0))


def _receive(url: str, part: Path, fetch: _Fetch) -> bool:
    """One attempt, from the end of `part`; whether the file is complete after it."""
    offset = _size(part)
    headers = {"User-Agent": "pyro-scm", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = fetch.opener(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
            raise
        error.close()
        if error.headers.get("Content-Range", "").strip() == f"bytes */{offset}":
            return True  # everything had arrived before the last interruption
        part.unlink()  # longer than the file, so not a part of it
        return False
    with response:
        if offset and not _continues(response, offset):
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length is not None else None
        _check_space(part.parent, (total or 0) - offset, url)
        _write(response, part, offset, total, fetch.progress)
    return total is None or _size(part) == total


def _continues(response: Any, offset: int) -> bool:
    """Whether the server sends the rest only, and not the file from its start."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes").strip().split("-")[0]
    return bool(response.status == http.client.PARTIAL_CONTENT and start == str(offset))


def _write(response: Any, part: Path, offset: int, total: int | None, progress: bool) -> None:
    from tqdm import tqdm

    name = part.name.removesuffix(".part")
    bar = tqdm(desc=name, total=total, initial=offset, unit="B", unit_scale=True, disable=not progress)
    try:
        with bar, part.open("ab" if offset else "wb") as out:
            while chunk := _chunk(response):
                out.write(chunk)
                bar.update(len(chunk))
    except OSError as error:  # the disk's: those of the connection are _Interrupted
        raise DataError(f"{part} cannot be written ({error}): free some space or name another folder") from error


def _chunk(response: Any) -> bytes:
    try:
        return bytes(response.read(CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
