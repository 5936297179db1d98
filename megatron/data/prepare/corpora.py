"""Public corpora by name: where they lie, and how to get them onto this machine."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron.data.prepare.documents import Input
from megatron.data.prepare.inputs import input_at
from megatron.data.prepare.tables import HubDataset
from megatron.errors import DataError
from megatron.io.download import Remote, download
from megatron.io.durable import atomic_write

_MEMBER = re.compile(r"[\w.-]+\.jsonl\.zst")
_BYTES_AT_A_TIME = 1 << 20
_LARGEST_ENWIK8 = 100_000_000
_MIRROR = (
    "Its publisher has taken it down, or the address has changed. Give a mirror that has the same files (--base-url), "
    "or tokenize files of your own with tools/datasets/preprocess_data.py --input."
)


@dataclass(frozen=True)
class FileCorpus:
    """Files of a server."""

    base_url: str
    files: tuple[str, ...]
    sums: str | None = None
    """Published hashes, in the form of sha256sum, beside the files."""

    def inputs(self, folder: Path, base_url: str | None, report: Callable[[str], None]) -> list[Input]:
        """Downloads what is missing into `folder`, and returns the inputs. Raises DataError when a source is dead."""
        base = (base_url or self.base_url).rstrip("/")
        sums = self._sums(folder, base, report)
        inputs: list[Input] = []
        for name in self.files:
            path = folder / Path(name).name
            remote = Remote(f"{base}/{name}", sums.get(Path(name).name), _MIRROR)
            download(remote, path, lambda done, total, name=name: report(_amount(name, done, total)))  # type: ignore[misc]
            inputs += [input_at(text) for text in texts_in(path)]
        return inputs

    def _sums(self, folder: Path, base: str, report: Callable[[str], None]) -> dict[str, str]:
        if self.sums is None:
            return {}
        path = folder / Path(self.sums).name
        try:
            download(Remote(f"{base}/{self.sums}"), path, lambda done, total: None)
        except DataError as error:
            report(f"no published hashes to compare with ({error})")
            return {}
        pairs = (line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
        return {Path(pair[1].lstrip("*")).name: pair[0].lower() for pair in pairs if len(pair) == 2}


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the Hugging Face hub, which is streamed; the library compares what it downloads."""

    name: str
    config: str | None = None

    def inputs(self, folder: Path, base_url: str | None, report: Callable[[str], None]) -> list[Input]:
        """Opens the dataset. Raises DataError when it cannot be reached."""
        if base_url is not None:
            raise DataError(
                f"--base-url: {self.name} comes from the Hugging Face hub, whose mirrors HF_ENDPOINT names."
            )
        report(f"streaming {self.name}")
        return [HubDataset(self.name, self.config, "train")]


THE_EYE = "https://the-eye.eu/public/AI"
CORPORA: dict[str, FileCorpus | HubCorpus] = {
    "pile": FileCorpus(
        f"{THE_EYE}/pile", tuple(f"train/{number:02}.jsonl.zst" for number in range(30)), sums="SHA256SUMS.txt"
    ),
    "openwebtext2": FileCorpus(f"{THE_EYE}/pile_preliminary_components", ("openwebtext2.jsonl.zst.tar",)),
    "openwebtext": HubCorpus("Skylion007/openwebtext"),
    "fineweb_edu": HubCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "enwik8": FileCorpus("https://data.deepai.org", ("enwik8.zip",)),
    "wikitext": HubCorpus("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def texts_in(path: Path) -> Sequence[Path]:
    """Returns the text files of a download: itself, or what an archive holds, which is taken out beside it.

    Raises DataError when an archive is damaged, holds none, or has a member that would lie elsewhere.
    """
    if path.suffix not in (".tar", ".zip"):
        return [path]
    try:
        return _from_tar(path) if path.suffix == ".tar" else _from_zip(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole archive ({error}). Delete it, and download it again.") from error


def _from_tar(path: Path) -> list[Path]:
    taken = []
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{path}: its member {member.name!r} would lie outside of its folder; not opened.")
            if member.isfile() and _MEMBER.fullmatch(name.name):
                content = archive.extractfile(member)
                assert content is not None, "a regular file"  # noqa: S101
                taken.append(_take_out(content, path.parent / name.name, member.size))
    if not taken:
        raise DataError(f"{path}: holds no .jsonl.zst file.")
    return sorted(taken)


def _from_zip(path: Path) -> list[Path]:
    with zipfile.ZipFile(path) as archive:
        try:
            member = archive.getinfo(path.stem)
        except KeyError:
            raise DataError(f"{path}: holds no file {path.stem!r}.") from None
        if member.file_size > _LARGEST_ENWIK8:
            raise DataError(f"{path}: {member.filename!r} would become {member.file_size:,} bytes. It is not opened.")
        with archive.open(member) as content:
            return [_take_out(content, path.with_suffix(".txt"), member.file_size)]


def _take_out(content: IO[bytes], path: Path, size: int) -> Path:
    """Writes a member of an archive, unless it is there. Raises DataError when it is not of the size that it claims."""
    if path.is_file() and path.stat().st_size == size:
        return path
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        written = 0
        while data := content.read(_BYTES_AT_A_TIME):
            written += len(data)
            if written > size:
                break
            file.write(data)
        if written != size:
            raise DataError(f"{path.name}: not of the {size:,} bytes that its archive claims. Download it again.")
    return path


def _amount(name: str, done: int, total: int | None) -> str:
    return f"{name}: {done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else "")
