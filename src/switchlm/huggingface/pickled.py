"""Read pickled weights (.bin), after a check that they describe tensors within their file.

PyTorch's `weights_only` runs no code of a pickle, but believes its numbers: a file of 400 bytes
allocates gigabytes, a compressed archive unpacks to as many, a tuple of tuples as key is hashed for
ever. So the pickle is read twice. First here, without making any object: only the instructions of
a dictionary of tensors are known, keys are texts, and each tensor lies in a storage that the file
holds. Then by `torch.load`.
"""

import pickletools
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from switchlm.errors import CheckpointError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of files that are no zip archives
_END, _LARGE_END = 22, 76  # bytes at the end of an archive without comment; before, if large
_MOST_DIMS = 16
_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip


def unpickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .bin file. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            (_check_archive if archive else _check_stream)(path, file)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(
            f"{path.name} is damaged, or has objects other than tensors, which could run code and "
            f"are not read: {str(error)[:200]}"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(f"{path.name} is not a dictionary of tensors.")
    return loaded


class _Global(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    key: str
    num_values: int
    item_bytes: int


class _Dict:
    """A dictionary, of which only the type matters."""


class _Tensor:
    """A tensor within its storage."""


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Check a zip archive: nothing compressed, one directory, every storage as large as named."""
    size = path.stat().st_size
    if not _directory_is_last(file, size):
        raise ValueError("the archive has something before or after its directory")
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two files in the archive have one name")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename[:60]!r} in the archive is compressed")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("files in the archive overlap")
        folder = next(iter(entries)).split("/")[0]
        if f"{folder}/constants.pkl" in entries or f"{folder}/data.pkl" not in entries:
            raise ValueError("it is another archive than of torch.save")
        with archive.open(f"{folder}/data.pkl") as pickle:
            _, storages = _interpret(pickle)
    for storage in storages.values():
        held = entries.get(f"{folder}/data/{storage.key}")
        if held is None or held.file_size < storage.num_values * storage.item_bytes:
            raise ValueError(f"it lacks the values of storage {storage.key[:60]!r}")


def _directory_is_last(file: BinaryIO, size: int) -> bool:
    """Return whether the directory of an archive ends at its end; else others may find another."""
    file.seek(max(0, size - _END - _LARGE_END))
    tail = file.read()
    if tail[-_END : -_END + 4] != b"PK\x05\x06":
        return False
    if tail[:4] == b"PK\x06\x06" and len(tail) == _END + _LARGE_END:  # as PyTorch writes it
        length, start = (int.from_bytes(tail[at : at + 8], "little") for at in (40, 48))
        return start + length == size - _END - _LARGE_END
    length, start = (int.from_bytes(tail[-_END + at :][:4], "little") for at in (12, 16))
    return start + length == size - _END


def _check_stream(path: Path, file: BinaryIO) -> None:
    """Check a file of before PyTorch 1.6: five pickles, then the values of the storages."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        pass
    else:
        raise ValueError("it is a tar archive, of before PyTorch 0.1")
    if [_interpret(file)[0], _interpret(file)[0]] != [_MAGIC, _VERSION]:
        raise ValueError("it does not begin as a file of torch.save")
    _interpret(file)  # sizes of numbers
    _, storages = _interpret(file)
    keys, _ = _interpret(file)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("it lacks the values of a storage")
    size = path.stat().st_size
    for key in keys:
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.num_values:
            raise ValueError(f"storage {key[:60]!r} has another size than its tensors")
        if file.seek(storage.num_values * storage.item_bytes, 1) > size:
            raise ValueError(f"it lacks the values of storage {key[:60]!r}")


def _interpret(file: Any) -> tuple[Any, dict[str, _Storage]]:
    """Return the value of the next pickle, without its tensors, and the storages that it names.

    Raises ValueError for instructions that the pickle of a dictionary of tensors does not have.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, _Storage] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append(_Dict())
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ")))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            values = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], _Dict) or not all(type(k) is str for k in pairs[::2]):
                raise ValueError("a key is no text")
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            if storages.setdefault(storage.key, storage) != storage:
                raise ValueError("a storage has two sizes")
            stack.append(storage)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _result(stack[-1], arguments)
        elif name == "BUILD":
            if not isinstance(stack.pop(), _Dict) or not isinstance(stack[-1], _Dict):
                raise ValueError("it sets attributes of an object")
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"the pickle has the instruction {name}")
    return stack.pop(), storages


def _storage(identity: Any) -> _Storage:
    """Return the storage of a persistent id: its type, key, device and number of values."""
    kind, type_, key, device, number, *view = identity
    known = isinstance(type_, _Global) and type_.module == "torch" and type_.name in _BYTES
    if kind != "storage" or not known or any(part is not None for part in view):
        raise ValueError(f"it has a storage of the type {type_!s:.60}")
    if type(key) is not str or type(device) is not str or not _is_count(number):
        raise ValueError("a storage has no key or size")
    return _Storage(key, number, _BYTES[type_.name])


def _result(function: Any, arguments: Any) -> Any:
    """Return what a call makes: only tensors and empty dictionaries."""
    if function == ("collections", "OrderedDict") and arguments == ():
        return _Dict()
    if function == ("torch._utils", "_rebuild_parameter"):
        if len(arguments) == 3 and isinstance(arguments[0], _Tensor):
            return arguments[0]
    elif function in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
        storage, offset, shape, strides, *others = arguments
        if len(others) not in (0, 2):
            raise ValueError("a tensor has attributes")
        if _lies_within(storage, offset, shape, strides):
            return _Tensor()
        raise ValueError("a tensor claims more than its storage holds")
    raise ValueError(f"it calls {function!s:.80}")


def _lies_within(storage: Any, offset: Any, shape: Any, strides: Any) -> bool:
    if not isinstance(storage, _Storage) or not all(type(v) is tuple for v in (shape, strides)):
        return False
    if len(shape) != len(strides) or len(shape) > _MOST_DIMS:
        return False
    if not all(map(_is_count, (offset, *shape, *strides))):
        return False
    if 0 in shape:
        return True
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return last < storage.num_values


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62
