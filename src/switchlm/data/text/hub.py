"""Datasets of the hub as text: `hub:NAME[:CONFIG][:SPLIT]`, of one revision, streamed.

The revision is part of what names a token cache, so that a changed dataset is read again. It is
remembered beside the caches: without a network the text of the last revision is used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from switchlm.data.config import Columns
from switchlm.data.text.readers import Document, read_records
from switchlm.errors import DataError, require
from switchlm.files import Report, make_folder, replace_file

SECONDS = 10.0  # to wait for the hub


def parse_location(location: str) -> tuple[str, str | None, str]:
    """Return the name, the configuration and the split of a dataset; the split is `train`."""
    _, name, *rest = location.split(":")
    if not name or len(rest) > 2:
        raise DataError(
            f"Cannot read {location!r}: write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT."
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def find_revision(location: str, folder: Path, report: Report) -> str:
    """Return the present revision of a dataset, or the last one known if the hub does not answer.

    folder: of the caches, where revisions are remembered.

    Raises DataError if neither is known.
    """
    name = parse_location(location)[0]
    hub = require("huggingface_hub", "hub", f"Reading {location}")
    digest = hashlib.sha256(name.encode()).hexdigest()[:24]
    known = folder / f"hub-{digest}.json"
    try:
        revision = str(hub.HfApi().dataset_info(name, timeout=SECONDS).sha)
    except Exception as error:  # of the network, the hub or its client, in many classes
        try:
            revision = str(json.loads(known.read_text(encoding="utf-8"))["revision"])
        except (OSError, ValueError, LookupError, TypeError):
            raise DataError(
                f"Cannot find the dataset {name!r} on the hub: {error}. Check the name and the "
                "network, or give files."
            ) from None
        report(f"The hub does not answer; {location} is read as of revision {revision[:12]}")
        return revision
    make_folder(folder)
    replace_file(known, json.dumps({"name": name, "revision": revision}).encode())
    return revision


def read_hub(
    location: str, revision: str | None, columns: Columns, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of a dataset; None takes its present revision."""
    datasets = require("datasets", "hub", f"Reading {location}")
    name, config, split = parse_location(location)
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        yield from read_records(rows, location, columns, skipped)
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {location!r} from the hub: {error}") from None
