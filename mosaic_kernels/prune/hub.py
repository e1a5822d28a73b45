# SPDX-License-Identifier: Apache-2.0
"""Reads datasets of the hub by name: the usual corpora, and any other that needs no loading script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mosaic_kernels.documents import documents
from mosaic_kernels.errors import EnvironmentError_, MosaicError, UsageError


class Source(NamedTuple):
    """The place of a corpus: hub id, configuration, split, column of texts, branch."""

    path: str
    configuration: str | None = None
    split: str = "train"
    column: str | None = None
    revision: str | None = None


# ptb's own branch is a loading script, which datasets 4 no longer runs; the hub has converted it to Parquet beside it.
DATASETS = {
    "wikitext2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", column="text"),
    "c4": Source("allenai/c4", "en", column="text"),
    "ptb": Source("ptb-text-only/ptb_text_only", "penn_treebank", column="sentence", revision="refs/convert/parquet"),
}
# Names of these datasets before the hub moved them under their owners.
_OLD_NAMES = {"ptb_text_only": "ptb", "penn_treebank": "ptb", "wikitext": "wikitext2", "wikitext-2": "wikitext2"}
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INSTEAD = "give a local file (docs/calibration.md), which works offline"


def source_of(name: str) -> tuple[str, Source]:
    """The data set called ``name``, a name in :data:`DATASETS` or a hub id, also ``ID:COLUMN``.

    Raises:
        UsageError: this is no hub id.
    """
    whole, _, column = name.partition(":")
    if not _ID.fullmatch(whole):
        raise UsageError(f"calibration: {name!r} is neither a file here nor the name of a dataset; {_INSTEAD}")
    known = DATASETS.get(_OLD_NAMES.get(whole, whole), Source(whole))
    return name, known._replace(column=column) if column else known


def dataset_documents(name: str, most: int) -> Iterator[Any]:
    """The first ``most`` documents of a data set of the hub. Scripts are not run.

    Raises:
        UsageError: ``name`` is no hub id, a local folder hides it, or the column is not known.
        EnvironmentError_: the package ``datasets`` is missing, or the hub cannot be reached.
    """
    name, source = source_of(name)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EnvironmentError_(
            f"calibration dataset '{name}' needs the 'datasets' package: pip install 'mosaic-kernels[datasets]', "
            "or give a local text file, which works offline"
        ) from error
    if Path(source.path).exists():  # the package datasets would read this folder instead, with any script in it
        raise UsageError(
            f"calibration: the folder {source.path} here hides the dataset '{name}' of the hub: "
            f"give ./{source.path} to read that folder, or start from another directory"
        )
    options: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    try:
        stream = load_dataset(source.path, source.configuration, split=source.split, streaming=True, **options)
        yield from documents(_checked(stream.take(most), source), f"calibration dataset '{name}'", source.column)
    except MosaicError:
        raise
    except Exception as error:  # the hub's errors have no common base
        others = ", ".join(other for other in DATASETS if other != name)
        raise EnvironmentError_(
            f"calibration dataset '{name}' could not be read ({type(error).__name__}: {_first_line(error)}); "
            f"give a local text file, which works offline, or another of {others}, or a hub id that needs no script"
        ) from error


def _checked(rows: Any, source: Source) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        if source.column is not None and source.column not in row:
            raise KeyError(source.column)
        yield row


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
