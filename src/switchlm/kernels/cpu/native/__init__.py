"""The kernels in C: compiled for this machine's processor when first needed.

They do what PyTorch's operators do not, such as matmul of few rows that reads weights of any format
at the speed of memory. Without a compiler PyTorch's operators are used.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.files import hidden_folder, remove_folder, sync

WIDTH = 16  # rows are multiples of it: whole vectors on every processor
COMPILERS = ("gcc", "cc", "clang")
UNITS = (
    "small_batch.c",
    "decode_attention.c",
    "gemm.c",
    "attention.c",
    "norm.c",
    "router.c",
    "switch.c",
    "cross_entropy.c",
)
HEADERS = ("vectors.h", "gemm.h")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_PROCESSOR = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native"}
_OPENMP = "-fopenmp"
_SECONDS = 120  # limit for the compiler, which takes three


@dataclass(frozen=True)
class Native:
    """The compiled library, or why there is none.

    threads: whether it uses more than one.
    """

    library: ctypes.CDLL | None
    reason: str
    threads: bool = False


def misfit(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why the library may not read these tensors, None if it may.

    They are plain, in main memory, of `dtype`. Tracing, dispatch modes and function transforms do
    not see a call into C, so PyTorch's operators run there.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "traced"
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
            return "not plain tensors in main memory"
        if tensor.dtype != dtype:
            return f"it takes {dtype}, not {tensor.dtype}"
    if _torch.has_dispatch_mode() or _torch.is_transformed():
        return "in a dispatch mode or a function transform"
    return None if native().library is not None else native().reason


def library() -> ctypes.CDLL:
    """Return the library, for tensors that have no `misfit`."""
    built = native()
    assert built.library is not None, built.reason
    return built.library


def threads_for(size: int, least: int) -> int:
    """Return how many threads share work of this size; one if it is below `least`.

    The number changes no bit of a result.
    """
    return torch.get_num_threads() if size >= least and native().threads else 1


@cache
def native() -> Native:
    """Return the library, compiled at the first call on this machine; never raises."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return Native(None, f"there is no C compiler ({', '.join(COMPILERS)})")
    files = resources.files(__package__)
    source = {name: files.joinpath(name).read_bytes() for name in (*UNITS, *HEADERS)}
    reason = ""
    # With PyTorch's OpenMP threads if the compiler has the same library: two would compete.
    for threads in (True, False):
        try:
            built = _loaded(compiler, source, threads)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()[:500]
            continue
        _declare(built)
        if _works(built, threads):
            how = f"compiled by {compiler}" + ("" if threads else ", one thread")
            return Native(built, how, threads)
        reason = f"what {compiler} compiled computes wrongly"
    return Native(None, reason)


def _loaded(compiler: str, source: dict[str, bytes], threads: bool) -> ctypes.CDLL:
    """Return the library, from the user's cache if it is there already."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, text=True, timeout=_SECONDS
    ).stdout
    flags = [*_FLAGS, *([_OPENMP] if threads else [])]
    if processor := _PROCESSOR.get(platform.machine()):
        flags.append(processor)
    contents = (*source.values(), version.encode(), _processor(), repr(flags).encode())
    name = hashlib.sha256(b"\0".join(contents)).hexdigest()[:24] + ".so"
    try:
        place = Path.home() / ".cache" / "switchlm" / "native" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(place):
            _compile([compiler, *flags], source, place)
        return ctypes.CDLL(str(place))
    except (OSError, RuntimeError):  # no home, not writable, or mounted noexec
        with tempfile.TemporaryDirectory() as folder:
            _compile([compiler, *flags], source, Path(folder) / name)
            return ctypes.CDLL(str(Path(folder) / name))


def _is_whole(place: Path) -> bool:
    """Whether the library is there and as it was compiled: a cut one would end the process."""
    try:
        wanted = place.with_suffix(".sha256").read_text(encoding="ascii")
        return hashlib.sha256(place.read_bytes()).hexdigest() == wanted
    except (OSError, ValueError):
        return False


def _compile(command: list[str], source: dict[str, bytes], place: Path) -> None:
    """Write the library to `place` atomically, and its checksum beside it.

    command: the compiler and its flags.
    """
    folder = hidden_folder(place)  # which the next process deletes if this one is killed
    try:
        for name, content in source.items():
            (folder / name).write_bytes(content)
        # Linked without OpenMP, so that its symbols resolve to the library that PyTorch loaded.
        objects = [Path(name).with_suffix(".o").name for name in UNITS]
        for step in ([*command, "-c", *UNITS], [command[0], "-shared", *objects, "-lm"]):
            subprocess.run(
                step, cwd=folder, capture_output=True, check=True, text=True, timeout=_SECONDS
            )
        checksum = folder / "sha256"
        content = (folder / "a.out").read_bytes()
        checksum.write_text(hashlib.sha256(content).hexdigest(), encoding="ascii")
        sync(folder / "a.out")
        sync(checksum)
        os.replace(folder / "a.out", place)
        os.replace(checksum, place.with_suffix(".sha256"))
    finally:
        remove_folder(folder)


def _processor() -> bytes:
    """Return what identifies this kind of processor, since machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)})).encode()


# Arguments and result of every function: pointer, long (int64), int, float.
_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_SIGNATURES: dict[str, tuple[str, str | None]] = {
    "small_batch_matmul": ("i pp llll pp l p l i", "i"),
    "cross_entropy": ("pppp ll i", "l"),
    "cross_entropy_backward": ("ppppp ll i", None),
    "rms_norm": ("pppp ll f i", None),
    "rms_norm_backward": ("pppppp ll i", None),
    "decode_attention": ("i ppppp lllllll lll i", "i"),
    "attention": ("p i i", "i"),
    "gemm": ("p ll p l p l lll i i", None),
    "gemm_nt": ("p l p l p l lll i", None),
    "route": ("pppp lllll p pppppppppp", None),
    "route_backward": ("ppp llll pppp pppp p pp", None),
    "sort_by_expert": ("pp ll ppp", None),
    "switch_experts": ("pppp llll ppp i pp", None),
    "switch_experts_backward": ("ppppp llll pp pp pppp", None),
}


def _declare(built: ctypes.CDLL) -> None:
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes = [_KINDS[letter] for letter in arguments.replace(" ", "")]
        function.restype = None if result is None else _KINDS[result]


@torch.autocast("cpu", enabled=False)  # which is on if a bfloat16 model is the first to ask
def _works(built: ctypes.CDLL, threads: bool) -> bool:
    """Test one function of each kind: matmul exactly, with small integers; the others closely."""
    x = torch.arange(3 * 64, device="cpu").remainder(7).float().view(3, 64)
    weight = torch.arange(32 * 64, device="cpu").remainder(5).float().view(32, 64)
    y, counts = x.new_zeros(3, 32), torch.tensor([3], device="cpu")
    failed = built.small_batch_matmul(
        0, weight.data_ptr(), None, 0, 64, 32, 0,
        x.data_ptr(), y.data_ptr(), 3, counts.data_ptr(), 1, 2 if threads else 1,
    )  # fmt: skip
    expected, columns = x @ weight.t(), weight.t().contiguous()
    if failed or not torch.equal(y, expected):
        return False
    y.zero_()
    built.gemm(x.data_ptr(), 64, 1, columns.data_ptr(), 32, y.data_ptr(), 32, 3, 64, 32, 0, 0)
    if not torch.equal(y, expected):
        return False
    normed, weight_D = torch.zeros_like(x), weight[1].clone()
    built.rms_norm(x.data_ptr(), weight_D.data_ptr(), normed.data_ptr(), None, 3, 64, 1e-6, 1)
    if not torch.allclose(normed, nn.functional.rms_norm(x, (64,), weight_D, 1e-6)):
        return False
    targets, loss, kept = counts.repeat(3), x.new_zeros(3), x.new_empty(2, 3)
    pointers = (tensor.data_ptr() for tensor in (x, targets, loss, kept))
    built.cross_entropy(*pointers, 3, 64, 1)
    return torch.allclose(loss, nn.functional.cross_entropy(x, targets, reduction="none"))
