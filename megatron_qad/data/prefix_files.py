"""The names of the files of a prefix: which exist, and what a mistyped prefix may have meant. Needs neither torch nor
Megatron."""

import difflib
from pathlib import Path

from megatron_qad.data.metadata import metadata_path, pairs_of_files
from megatron_qad.engine.errors import QADError

COPY_AGAIN = "Copy all files of the prefix again, or prepare the data again."
"""The next step if files of a prefix do not belong together."""


def file_sizes(prefix: str) -> dict[str, int]:
    """Return the size in bytes of each file of a prefix that exists.

    Raises:
        QADError: one of PREFIX.bin and PREFIX.idx does not exist, or only one of the two files of the loss mask, the
            images or their references does.
    """
    pairs = [(f"{other}.bin", f"{other}.idx") for other in pairs_of_files(prefix).values()]
    names = [f"{prefix}.bin", f"{prefix}.idx", *(name for pair in pairs for name in pair), str(metadata_path(prefix))]
    sizes = {name: Path(name).stat().st_size for name in names if Path(name).is_file()}
    if missing := [name for name in names[:2] if name not in sizes]:
        raise QADError(
            f"--data-path {prefix}: {' and '.join(missing)} not found{_near_names(prefix)}. Expected the --output "
            "prefix of megatron-qad prepare (without .bin), or 'WEIGHT PREFIX' pairs."
        )
    for pair in pairs:
        found = [name for name in pair if name in sizes]
        if len(found) == 1:
            lost = pair[0] if found[0] == pair[1] else pair[1]
            raise QADError(f"--data-path {prefix}: {found[0]} exists, but {lost} does not. {COPY_AGAIN}")
    return sizes


def _near_names(prefix: str) -> str:
    """Return ``" (did you mean data/chats?)"`` if data with a similar prefix exists, or an empty string."""
    path = Path(prefix)
    folders = [folder for folder in (path.parent, path) if folder.is_dir()]
    known = [str(file)[: -len(".idx")] for folder in folders for file in sorted(folder.glob("*.idx"))]
    known = [
        name
        for name in known
        if Path(f"{name}.bin").is_file() and not name.endswith(tuple(pairs_of_files("").values()))
    ]
    stem = prefix.removesuffix(path.suffix) if path.suffix in (".bin", ".idx", ".json") else prefix
    stem = str(Path(stem.removesuffix("_loss_mask")))
    # First other spellings of the same name, and data in a folder of that name, then similar names.
    close = [name for name in known if name == stem or name.startswith((f"{stem}.", f"{stem}_", f"{stem}/"))]
    close = close or difflib.get_close_matches(stem, known, n=1, cutoff=0.8)
    return f" (did you mean {close[0]}?)" if close else ""
