"""Files inside zip and tar archives, without unpacking them.

    zip                      its directory says where each file is
    tar                      headers are hopped over; a file is read by its place
    tar.gz, tar.bz2, tar.xz  can only be read from the front: files pass by, once for the survey,
                             and again, from the front, to go on

Names are kept below the archive: a leading slash and ".." are taken out of them, for nothing is
ever written by them. Links are not followed. An archive that ends too early gives what it has, and
a record that says so.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from stratagem.data.decoding import BadImage, cause_of
from stratagem.data.sources import File

__all__ = ["archive_files", "is_archive"]

_PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_UTF8 = 0x800  # flag of a name in a zip
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def is_archive(path: Path) -> bool:
    """Whether a file is named like an archive that can be read here."""
    return path.name.lower().endswith((".zip", *_TAR)) and path.is_file()


def archive_files(path: Path) -> Iterator[File]:
    """Yields the files of an archive in its order; hidden files are left out."""
    try:
        for file in _zip(path) if path.name.lower().endswith(".zip") else _tar(path):
            name = "/".join(part for part in file.name.split("/") if part not in {"", ".", ".."})
            if not any(part.startswith(".") for part in name.split("/")):
                yield file._replace(name=name)
    except (*_BROKEN, OSError) as error:
        yield File(path.name, f"the archive cannot be read beyond this: {cause_of(error)}")


def _zip(path: Path) -> Iterator[File]:
    with zipfile.ZipFile(path) as archive:
        for index, info in enumerate(archive.infolist()):
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                yield File(_zip_name(info), "a link inside an archive")
            elif info.flag_bits & 1:
                yield File(_zip_name(info), "encrypted")
            else:
                yield File(_zip_name(info), functools.partial(_zipped, path, index))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Returns a name; Info-ZIP's `zip` writes UTF-8 without saying so, and zipfile reads cp437."""
    if not info.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode()
    return info.filename


def _zipped(path: Path, index: int) -> BinaryIO:
    archive = _open_zip((path, path.stat().st_mtime_ns))
    return cast(BinaryIO, archive.open(archive.infolist()[index]))


@functools.lru_cache(1)  # to be opened, its whole directory is read
def _open_zip(version: tuple[Path, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(version[0])


def _tar(path: Path) -> Iterator[File]:
    with path.open("rb") as stream:
        unpack = _PACKED.get(stream.read(2))
    return _plain_tar(path) if unpack is None else _packed_tar(path, unpack)


def _plain_tar(path: Path) -> Iterator[File]:
    with tarfile.open(path, "r:") as archive:
        for member in _members(archive):
            place = functools.partial(_tarred, path, member.offset_data, member.size)
            yield File(member.name, _unusable(member) or place)
    if path.stat().st_size % tarfile.BLOCKSIZE:
        raise EOFError("it ends too early")


def _packed_tar(path: Path, unpack: Callable[[Path], Any]) -> Iterator[File]:
    with unpack(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in _members(archive):
            if cause := _unusable(member):
                yield File(member.name, cause)
                continue
            content = archive.extractfile(member)
            assert content is not None
            yield File(member.name, functools.partial(io.BytesIO, content.read()))
        while stream.read(1 << 20):  # to the end, whose absence is an error
            pass


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # they would be kept, all of them
        if not member.isdir():
            yield member


def _unusable(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link inside an archive"
    return "" if member.isreg() and not member.issparse() else "not a regular file"


def _tarred(path: Path, offset: int, size: int) -> BinaryIO:
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise BadImage("the archive ends within it")
    return io.BytesIO(content)
