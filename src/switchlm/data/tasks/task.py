"""A task: templates that make an input text and a target text from the columns of a record.

T5 puts every task into this form (Raffel et al. 2020, section 2.4), so that one model, one loss and
one decoding procedure serve all of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchlm.errors import DataError, nearest

Record = dict[str, Any]

_FIELD = re.compile(r"\{([^{}]+)\}")
_UNLABELLED = ("", "-1", "None")
MOST_UNREADABLE = 0.1  # of the records of a split
_NO_LABELS = (
    " Training and scoring need labels; the test sets of some benchmarks have none, so take the "
    "validation split."
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair of texts.

    target: the answer to train on.
    references: all correct answers.
    identity: the group of the example, such as its paragraph; the input by default. Examples of one
        identity are in the same split, and are resampled together.
    """

    input: str
    target: str
    references: tuple[str, ...]
    identity: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; `tasks.yaml` holds the named ones.

    input, target: templates over the columns of a record, such as `sst2 sentence: {sentence}`;
        `{answers.text}` reaches into nested ones. A list in the target is several references, of
        which the first is trained on; a list in the input is joined by spaces.
    labels: texts of the target's column, in the order of their numbers; None for free text.
    label_values: other values of that column to the label.
    metrics: names in `evaluation/metrics.py`; the first chooses the best checkpoint.
    columns: from names in a file to names in the templates, if they differ.
    header: column names of tab-separated files without a header line.
    flatten: function from one record to the flat records that the templates read (preprocessing); a
        record may have an `identity`.
    folder: name of the task's folder, if not that of the task; case and dashes are ignored.
    files: from a split to the beginning of its file's name, if that is not the usual train,
        validation (dev, val, valid) or test.
    ragged: rows of tables with too few or too many columns are expected, and left out.
    skip_empty: leave out records with an empty input or target, or without a label.
    hub: `NAME[:CONFIG][@REVISION]` of a dataset.
    hub_splits: from a split to its name on the hub.
    path: the file or folder of a task that is not a named one.
    """

    name: str
    input: str
    target: str = "{label}"
    labels: tuple[str, ...] | None = None
    label_values: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    flatten: Callable[[Record], Iterable[Record]] | None = None
    folder: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    ragged: bool = False
    skip_empty: bool = False
    hub: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def needed(self) -> list[str]:
        """The top-level columns that the templates read, in order."""
        found = _FIELD.findall(self.input + self.target)
        return list(dict.fromkeys(name.split(".")[0] for name in found))


class ExampleMaker:
    """Makes the examples of a task from records, and counts what it leaves out.

    unreadable: the number of records that are no UTF-8, no JSON, or no row of their table.
    first_unreadable: what is wrong with the first one.
    empty_inputs, empty_targets: examples with such a text.
    skipped_empty: records left out for that reason.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.made = self.unreadable = 0
        self.first_unreadable = ""
        self.empty_inputs = self.empty_targets = self.skipped_empty = 0

    def leave(self, why: str) -> None:
        """Count a record that cannot be read."""
        self.unreadable += 1
        self.first_unreadable = self.first_unreadable or why

    def check(self, place: str) -> None:
        """Raise DataError if more than one record in ten is unreadable (and more than one)."""
        total = self.made + self.unreadable
        if self.unreadable > (max(1, total * MOST_UNREADABLE) if self.made else 0):
            raise DataError(
                f"{self.unreadable:,} of {total:,} records in {place!r} cannot be read: "
                f"{self.first_unreadable}. A few are left out, but not so many."
            )

    def describe(self) -> str:
        """Return sentences on what is left out or empty, each after a space; else nothing."""
        said = []
        if self.unreadable:
            said.append(
                f" Records that cannot be read and are left out: {self.unreadable:,}; "
                f"{self.first_unreadable}."
            )
        if self.skipped_empty:
            said.append(f" Empty records that are left out: {self.skipped_empty:,}.")
        for number, what in ((self.empty_inputs, "inputs"), (self.empty_targets, "targets")):
            if number:
                said.append(
                    f" Empty {what}: {number:,}, the end token alone (--skip-empty leaves such "
                    "examples out)."
                )
        return "".join(said)

    def make(self, records: Iterable[Record], place: str) -> Iterator[Example]:
        """Yield the examples of records.

        place: origin of the records, for errors.

        Raises DataError for a missing column and an unknown label.
        """
        task = self.task
        for number, record in enumerate(records, start=1):
            where = f"Record {number} of {place}"
            try:
                rows = [record] if task.flatten is None else list(task.flatten(record))
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise DataError(
                    f"{where} does not have the structure of {task.name!r}: it has "
                    f"{', '.join(map(str, record))}, which gave {type(error).__name__}: {error}."
                ) from None
            for row in rows:
                example = self._example(row, where)
                if example is not None:
                    self.made += 1
                    yield example

    def _example(self, row: Record, where: str) -> Example | None:
        """Return the example of a record, None if it is left out."""
        task = self.task
        for theirs, ours in task.columns.items():
            if theirs in row and ours not in row:
                row = {**row, ours: row[theirs]}
        column = _FIELD.fullmatch(task.target)
        if task.labels is not None and column is not None and column[1] in row:
            value = row[column[1]]
            if task.skip_empty and _plain(value).strip() in _UNLABELLED:
                self.skipped_empty += 1
                return None
            row = {**row, column[1]: _label(task, value, where)}
        text = " ".join(_render(task.input, row, where, joined=True)).strip()
        answers = [answer.strip() for answer in _render(task.target, row, where)]
        references = tuple(answer for answer in dict.fromkeys(answers) if answer)
        if not (text or references) or (task.skip_empty and not (text and references)):
            self.skipped_empty += 1
            return None
        for part in (text, *references):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:  # an invalid byte; JSON may hold half of a surrogate pair
                self.leave(f"{where[0].lower()}{where[1:]} is not UTF-8")
                return None
        self.empty_inputs += not text
        self.empty_targets += not references
        references = references or ("",)
        return Example(
            input=text,
            target=references[0],
            references=references,
            identity=str(row.get("identity", text)),
        )


def _label(task: Task, value: Any, where: str) -> str:
    labels = task.labels or ()
    if isinstance(value, bool):
        value = int(value)
    text = _plain(value).strip()
    if text in labels:
        return text
    if text in task.label_values:
        return task.label_values[text]
    if text.isdecimal() and int(text) < len(labels):
        return labels[int(text)]
    if text in _UNLABELLED:
        raise DataError(f"{where} has no label.{_NO_LABELS}")
    raise DataError(
        f"{where} has the label {text!r}, which is not a label of the task {task.name!r}."
        f"{nearest(text, [*labels, *task.label_values])}"
    )


def _render(template: str, row: Record, where: str, *, joined: bool = False) -> list[str]:
    """Fill in a template; returns a text for each element of a list in it, unless `joined`."""
    texts = [""]
    position = 0
    for match in _FIELD.finditer(template):
        value = _lookup(row, match[1], where)
        values = [_plain(one) for one in value] if isinstance(value, list) else [_plain(value)]
        if joined:
            values = [" ".join(values)]
        before = template[position : match.start()]
        texts = [text + before + one for text in texts for one in values]
        position = match.end()
    return [text + template[position:] for text in texts]


def _plain(value: Any) -> str:
    """Return the text of a cell; null, and NaN for which Parquet and pandas write it, is empty."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)


def _lookup(row: Any, path: str, where: str) -> Any:
    """Return the value of a column, or of `column.key`, also of each element of a list."""
    if isinstance(row, list):
        return [_lookup(one, path, where) for one in row]
    if isinstance(row, dict):
        if path in row:
            return row[path]
        first, _, rest = path.partition(".")
        if rest and first in row:
            return _lookup(row[first], rest, where)
    columns = [str(name) for name in row] if isinstance(row, dict) else []
    hint = nearest(path, columns)
    raise DataError(
        f"{where} has no column {path!r}; it has: {', '.join(columns) or 'none'}."
        f"{hint if 'Did you mean' in hint else ''}{_NO_LABELS if path == 'label' else ''}"
    )
