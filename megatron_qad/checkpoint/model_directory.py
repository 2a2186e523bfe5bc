"""Access to the files of a Hugging Face model directory that somebody else wrote.

A link in such a directory must not lead out of it: an import or an export would otherwise copy a private file of the
user into a directory that is published. Hugging Face's cache consists of links (``models--ORG--NAME/snapshots/REVISION/
config.json`` -> ``../../blobs/HASH``); these are allowed, and the model directory itself may be a link.
"""

import codecs
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json, read_text

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(directory: Path, file: Path) -> Path:
    """Return ``file``, a path below ``directory``, after checking that it can be read as a file of the model.

    Raises:
        QADError: the path leads out of the directory, a link leads nowhere, the path is not a regular file, or the file
            is a Git LFS pointer instead of the content.
    """
    target = Path(os.path.realpath(file))
    if not any(target.is_relative_to(root) for root in _roots(directory)):
        raise QADError(
            f"{file}: leads to {target}, which is outside the model directory. Replace the link by a copy of the file, "
            "if you trust it."
        )
    if not target.is_file():
        reason = "is not a regular file" if target.exists() else f"is a link to {target}, which does not exist"
        raise QADError(f"{file}: {reason}. Download the file again.")
    with target.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise QADError(f"{file}: is a Git LFS pointer, not the file itself. Run 'git lfs pull' in its repository.")
    return file


def find_files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files whose names match ``patterns``, and all files in the directories that do.

    Raises:
        QADError: see ``check_file``; a link to a directory, which could contain itself; a JSON file that is not a JSON
            object or that begins with a byte order mark; or a tokenizer.json without a tokenizer model.
    """
    paths = {path for pattern in patterns for path in directory.glob(pattern)}
    for path in paths:
        if path.suffix and path.is_dir() and not path.is_symlink():
            raise QADError(f"{path}: is a directory, expected a file. Download it again.")
    files = [part for path in paths for part in ((path, *path.rglob("*")) if path.is_dir() else (path,))]
    files = sorted(check_file(directory, file) for file in files if file.is_symlink() or not file.is_dir())
    for file in files:
        if file.suffix == ".json":
            _check_json(file)
        elif file.suffix == ".jinja":
            read_text(file)
    return files


def _check_json(file: Path) -> None:
    """Check the content of a copied file as far as every loader needs it; a server would fail on it much later."""
    with file.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            raise QADError(f"{file}: begins with a byte order mark, which transformers does not read. Save it without.")
    content = read_json(file)
    if file.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
        raise QADError(f"{file}: no object 'model', which every tokenizer.json has. Download it again.")


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of ``find_files`` to the existing directory ``target``."""
    for file in find_files(source, patterns):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _roots(directory: Path) -> list[Path]:
    """Return the directories in which the files of a model may lie: its own and, in a cache, ``blobs`` of its model."""
    root = Path(os.path.realpath(directory))
    caches = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    return [root, *(cache / "blobs" for cache in caches[:1] if cache.name.startswith("models--"))]
