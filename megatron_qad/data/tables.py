"""Reads parquet and Arrow files and Hugging Face dataset directories as JSON records, with the ``datasets`` library.

Rows are streamed or mapped into memory. Nothing is fetched, and no code of a dataset is run: ``datasets`` gets files
only. Not supported: a directory whose README.md defines its files, CSV.
"""

import base64
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_qad.data.bad_document import BadDocument, failures_are_bad_documents
from megatron_qad.engine.errors import QADError

_DOCUMENT_COLUMNS = ("text", "messages", "conversations")
_COLUMNS = (*_DOCUMENT_COLUMNS, "system", "tools", "functions", "documents", "chat_template_kwargs", "finish")
"""Columns that a record uses. Others are not decoded."""
_IMAGE_COLUMNS = ("images", "image")


def read_rows(path: Path, with_images: bool = False) -> Iterator[str]:
    """Yield the rows of a parquet or Arrow file, or of a directory of ``save_to_disk``, as JSON objects.

    Args:
        with_images: whether to read the columns of images, too. The bytes of an image become base64 text.

    Raises:
        QADError: the file is damaged, or has no column with documents.
    """
    try:
        with tempfile.TemporaryDirectory() as cache, failures_are_bad_documents("the datasets library cannot read it"):
            dataset = _open(path, cache)
            columns = dataset.column_names
            if columns is not None and not set(columns) & set(_DOCUMENT_COLUMNS):
                raise BadDocument(f"has none of the columns {', '.join(_DOCUMENT_COLUMNS)}; it has {columns[:10]}")
            used = (*_COLUMNS, *_IMAGE_COLUMNS) if with_images else _COLUMNS
            selected = dataset.select_columns([c for c in columns or used if c in used])
            for row in _rows_of_arrow(selected) if with_images else selected:
                # Null: what the row lacks. default: dates and the like become their text.
                row = {key: value for key, value in row.items() if value is not None}
                yield json.dumps(row, ensure_ascii=False, default=_to_text)
    except BadDocument as error:
        raise QADError(f"--input {path}: {error}. Give another file, or download it again if it is damaged.") from error


def _rows_of_arrow(dataset) -> Iterator[dict]:
    """Yield the rows as they are stored: ``datasets`` would decode images, of which the file's bytes are needed."""
    for table in dataset.with_format("arrow").iter(batch_size=16):
        yield from table.to_pylist()


def _to_text(value: object) -> str:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def _open(path: Path, cache: str):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.suffix.lower() == ".arrow":
        return datasets.Dataset.from_file(str(path))
    files = [glob.escape(str(path.absolute()))]
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
    return dataset if dataset.column_names else dataset._resolve_features()
