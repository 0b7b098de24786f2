"""Records of a task from the hub, through the optional package `datasets`."""

from collections.abc import Iterator

from switchlm.data.task import Record, Task
from switchlm.errors import DataError, MissingExtraError


def read(task: Task, split: str) -> Iterator[Record]:
    """Yield the records of a split of `task.hub`.

    Raises MissingExtraError without the extra, DataError for what the hub does not have or where it
    cannot be reached.
    """
    if task.hub is None:
        raise DataError(f"The task {task.name!r} is not on the hub: give its files with --data.")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            "datasets", "hub", f"Reading the task {task.name!r} from the hub (or give --data PATH)"
        ) from None
    location, _, revision = task.hub.partition("@")
    name, _, config = location.partition(":")
    theirs = task.hub_splits.get(split, split)
    # A branch of Parquet files has a folder, and no description, for each configuration.
    part = {"data_dir": config, "revision": revision} if revision else {"name": config or None}
    try:
        rows = datasets.load_dataset(name, split=theirs, **part)
        for row in rows:
            yield dict(row)
    # The packages behind `datasets` raise errors of their own kinds.
    except Exception as error:
        raise DataError(
            f"Cannot read the {split} split of {task.name!r} from the hub ({task.hub}): {error}. "
            "Without a way to the hub, give its files with --data PATH."
        ) from None
