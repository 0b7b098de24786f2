"""Pickled weights: what PyTorch saves is read, and hostile files are refused before PyTorch."""

import pickle
import struct
import time
import zipfile

import pytest
import torch

from switchlm.errors import CheckpointError
from switchlm.huggingface.pickled import unpickle

MAGIC = 0x1950A86A20F9469CFC6C
REBUILD, ORDERED = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(count, shape=4, stride=1, view=b""):
    """Return the pickle of {"w": a tensor}, whose storage has `count` values."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(count) + view + b"tQ"
    arguments = storage + number(0) + number(shape) + b"\x85" + number(stride) + b"\x85\x89"
    return b"\x80\x02}" + text("w") + REBUILD + b"(" + arguments + ORDERED + b")RtRs."


def stream(body, *, keys=("0",), data=b""):
    """Return a file of before PyTorch 1.6."""
    parts = (MAGIC, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    return head + body + pickle.dumps(list(keys), 2) + data


def archive(body, data=b"", kind=zipfile.ZIP_STORED, more=()):
    def write(path):
        with zipfile.ZipFile(path, "w", kind) as file:
            for name, content in [("data.pkl", body), ("version", b"3\n"), ("data/0", data), *more]:
                file.writestr(f"a/{name}", content)

    return write


FOUR = struct.pack("<4f", 1, 2, 3, 4)
HEAD = b"\x80\x02"
HOSTILE = {
    "a key that is hashed for ever": stream(HEAD + b"})" + b"2\x86" * 60 + b"K\x01s."),
    "the same by its memo": stream(HEAD + b"})q\0" + b"h\0h\0\x86q\0" * 60 + b"K\x01s."),
    "an array of 2 GB": stream(HEAD + b"cbuiltins\nbytearray\n" + number(2**31) + b"\x85R."),
    "a storage of 2.8 GB": stream(tensor(700_000_000)),
    "a storage of less than nothing": stream(tensor(-4)),
    "a storage of two sizes": stream(tensor(4), data=struct.pack("<q", 5) + FOUR * 2),
    "a view": stream(tensor(4, view=b"(" + text("v") + b"K\0K\x04t")),
    "missing values": stream(tensor(4), data=struct.pack("<q", 4) + FOUR[:8]),
    "values of no storage": stream(tensor(4), keys=(), data=b""),
    "a tensor beyond its storage": archive(tensor(4, shape=700_000_000), FOUR),
    "a tensor before its storage": archive(tensor(4, stride=-1), FOUR),
    "a storage beyond the archive": archive(tensor(700_000_000), FOUR),
    "a compressed storage": archive(tensor(2**18), b"\0" * 2**20, zipfile.ZIP_DEFLATED),
    "a compressed pickle": archive(HEAD + b"N0" * 2**16 + b".", b"", zipfile.ZIP_DEFLATED),
    "a program": archive(tensor(4), FOUR, more=[("constants.pkl", b"")]),
    "no pickle": stream(b""),
    "lists in lists": stream(HEAD + b"(" * 100_000 + b"l."),
    "a missing memo": stream(HEAD + b"h\x07."),
    "an empty stack": stream(HEAD + b"s."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    made = HOSTILE[name]
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made(path)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("PyTorch reads it"))
    start = time.thread_time()
    with pytest.raises(CheckpointError, match="is damaged, or has objects other than tensors"):
        unpickle(path)
    assert time.thread_time() - start < 1


def test_files_with_two_directories_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    archive(tensor(4), FOUR)(path)
    assert unpickle(path)["w"].tolist() == [1, 2, 3, 4]
    whole = path.read_bytes()
    for changed in (whole + b"x", whole + whole, whole[:4] + b"\0" + whole[4:]):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            unpickle(path)


@pytest.mark.parametrize("old", [False, True])
def test_what_pytorch_saves_is_read(old, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    shared = torch.randn(8, 4)
    saved = torch.nn.Linear(3, 2).state_dict() | {
        "shared": shared, "again": shared, "transposed": shared.t(), "part": shared[2:4, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(3)), "half": torch.randn(2).half(),
        "bfloat16": torch.randn(2).bfloat16(), "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5), "expanded": torch.ones(1).expand(5), "ids": torch.arange(3),
    }  # fmt: skip
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    loaded = unpickle(path)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
