"""Stops writes of every kind after every step, and says what is left: test_crashes.py runs it.

Like crash_driver.py, but of all that is not a checkpoint: what a run begins with, its settings,
models, adapters, exports, caches, reports, comparisons and predictions. Prints one JSON object.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fallible_disk import Recorder

from switchlm.cli.results import json_lines
from switchlm.data.config import Columns
from switchlm.data.text.sources import parse
from switchlm.data.text.token_cache import open_cache
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import SwitchLMError
from switchlm.export import formats
from switchlm.files import MANIFEST, building, changed_folder, remove, replace_file
from switchlm.huggingface import load
from switchlm.huggingface.adapters import AdapterConfig, load_adapters, save_adapters
from switchlm.model import lora
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE
from switchlm.recipes.compare import _place
from switchlm.recipes.config import RunConfig, to_sections
from switchlm.recipes.start import hash_of_vocabulary, open_run, settings_of_run, started
from switchlm.report.write import write_report
from switchlm.training.config import TrainingConfig
from switchlm.training.run_folder import RunFolder

MODEL = ModelConfig(
    vocabulary_size=384, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, num_experts=2, sparse_step=1, router=RouterConfig(mode="paper"),
)  # fmt: skip
TOKENIZER = Tokenizer.bytes()
VERSIONS = {"old": 1, "new": 2}

Write = Callable[[Path, int], None]
Read = Callable[[Path], int | None]


def silent(line: str) -> None:
    pass


def model_of(version: int) -> SwitchTransformer:
    torch.manual_seed(version)
    return SwitchTransformer(MODEL)


def version_of(model: SwitchTransformer) -> int:
    """Return which of the models this is; all weights must be those of one."""
    state = model.state_dict()
    for version in VERSIONS.values():
        if all(torch.equal(state[name], t) for name, t in model_of(version).state_dict().items()):
            return version
    raise AssertionError("a model that never was")


# --- what commands write, and what a reader finds ---------------------------------------------


def begin_run(root: Path, version: int) -> None:
    """Start a run; if it exists, resume it with other settings."""
    settings = {"config.yaml": sections(version)}
    with open_run(root / "run", True, ALONE) as run:
        run.check(settings, silent)
        run.begin(settings, TOKENIZER, text="text")
        if run.is_new:
            replace_file(run.folder.kernels, b"{}")


def sections(version: int) -> dict[str, Any]:
    return to_sections(RunConfig(model=MODEL, training=TrainingConfig(steps=version)))


def read_run(root: Path) -> int | None:
    folder = RunFolder(root / "run")
    if not folder.exists():
        return None
    assert hash_of_vocabulary(Tokenizer.load(folder.tokenizer)) == started(folder)["vocabulary"]
    steps: int = settings_of_run(folder)["training"]["steps"]
    assert settings_of_run(folder) == sections(steps)
    return steps


def save_model(root: Path, version: int) -> None:
    load.save(model_of(version), TOKENIZER, root / "model", max_shard_bytes=2_000, report=silent)


def read_model(root: Path) -> int | None:
    if not (root / "model").exists():
        return None
    model, tokenizer = load.load(root / "model")
    assert tokenizer is not None
    return version_of(model)


def change_model(root: Path, version: int) -> None:
    with changed_folder(root / "model") as folder:
        load.save(model_of(version), None, folder / "new", report=silent)
        TOKENIZER.save(folder)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        for path in (folder / "new").iterdir():
            path.replace(folder / path.name)
        (folder / "new").rmdir()


def adapted(version: int) -> SwitchTransformer:
    model = model_of(1)
    lora.apply(model, rank=version, alpha=1.0, seed=0)
    return model


def write_adapters(root: Path, version: int) -> None:
    save_adapters(adapted(version), AdapterConfig(rank=version, alpha=1.0), root / "adapters")


def read_adapters(root: Path) -> int | None:
    if not (root / "adapters").exists():
        return None
    return load_adapters(model_of(1), root / "adapters").rank


def write_export(root: Path, version: int) -> None:
    form = formats.FORMS["torch"]
    with formats.new_folder(root / "export") as partial:
        for name in form.files:
            (partial / name).write_bytes(bytes([version] * 100))
        formats._describe(partial, model_of(1), TOKENIZER, form, None)


def read_export(root: Path) -> int | None:
    folder = root / "export"
    if not folder.exists():
        return None
    json.loads((folder / formats.ABOUT).read_text())
    Tokenizer.load(folder)
    (version,) = {
        byte for name in formats.FORMS["torch"].files for byte in (folder / name).read_bytes()
    }
    return version


def write_cache(root: Path, version: int) -> None:
    """Cache a text that is the same in every version; it is made, or it is there."""
    text = root / "text.txt"
    if not text.exists():
        replace_file(text, b"The token goes to the expert. " * 9)
    open_cache(
        parse(str(text)), TOKENIZER, root / "cache", columns=Columns(), max_documents=None,
        report=silent,
    )  # fmt: skip


def read_cache(root: Path) -> int | None:
    found = [path for path in root.glob("cache/tokens-*") if len(path.suffixes) == 0]
    for folder in found:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, _) in manifest["files"].items():
            assert (folder / name).stat().st_size == size
    return 2 if found else None


def write_kept(root: Path, version: int) -> None:
    """Write as the cache of a tokenizer does."""
    with building(root / "kept.json", silent) as part:
        if not (root / "kept.json").exists():
            part.write_text(json.dumps([2] * 50))


def read_kept(root: Path) -> int | None:
    path = root / "kept.json"
    return set(json.loads(path.read_text())).pop() if path.exists() else None


def write_report_of(root: Path, version: int) -> None:
    write_report(
        root / "report.html", title=f"version {version}", headline="", runs=[], configuration={}
    )


def read_report(root: Path) -> int | None:
    path = root / "report.html"
    if not path.exists():
        return None
    text = path.read_text()
    assert text.rstrip().endswith("</html>")
    return 1 if "version 1" in text else 2


def write_comparison(root: Path, version: int) -> None:
    with _place(root / "comparison", overwrite=True) as folder:
        for name in ("dense", "sparse"):
            with open_run(folder / name, False, ALONE) as run:
                run.begin({"config.yaml": sections(version)}, TOKENIZER, text="text")
        replace_file(folder / "compare.json", json.dumps([version]).encode())


def read_comparison(root: Path) -> int | None:
    folder = root / "comparison"
    if not (folder / "compare.json").exists():
        return None
    found = {
        settings_of_run(RunFolder(folder / n))["training"]["steps"] for n in ("dense", "sparse")
    }
    assert found == set(json.loads((folder / "compare.json").read_text()))
    return found.pop()


def write_predictions(root: Path, version: int) -> None:
    with json_lines(root / "predictions.jsonl", "prediction", "--predictions") as write:
        for _ in range(3):
            write({"prediction": version})


def read_predictions(root: Path) -> int | None:
    path = root / "predictions.jsonl"
    if not path.exists():
        return None
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first == second == third
    version: int = first["prediction"]
    return version


CASES: dict[str, tuple[Write, Read]] = {
    "run": (begin_run, read_run),
    "model": (save_model, read_model),
    "changed model": (change_model, read_model),
    "adapters": (write_adapters, read_adapters),
    "export": (write_export, read_export),
    "token cache": (write_cache, read_cache),
    "tokenizer's cache": (write_kept, read_kept),
    "report": (write_report_of, read_report),
    "comparison": (write_comparison, read_comparison),
    "predictions": (write_predictions, read_predictions),
}


def enumerate_stops(folder: Path, names: list[str]) -> dict[str, Any]:
    """Write for the first time, and again, and look at what a stop before any step leaves."""
    result: dict[str, Any] = {"failures": [], "found": {}}
    for name in names or CASES:
        for before in (None, 1):
            root, copies = folder / "root", folder / "copies"
            for path in (root, copies):
                remove(path)
                path.mkdir(parents=True)
            if before is not None:
                CASES[name][0](root, before)
            disk = Recorder(root, copies)
            disk.install()
            try:
                CASES[name][0](root, 2)
                disk.count()
            finally:
                disk.uninstall()
            for copy in sorted(copies.iterdir()):
                try:
                    state = judge(copy, *CASES[name], before)
                except (AssertionError, SwitchLMError, OSError, LookupError, ValueError) as error:
                    result["failures"].append([name, before, copy.name, repr(error)])
                    continue
                counts = result["found"].setdefault(name, {})
                counts[state] = counts.get(state, 0) + 1
            if CASES[name][1](root) != 2:
                result["failures"].append([name, before, "what was written was not found"])
    return result


def judge(root: Path, write: Write, read: Read, before: int | None) -> str:
    """Return which state a reader finds, and check that the next write succeeds and cleans up."""
    found = read(root)
    assert found in (before, 2), f"{found} was found"
    write(root, 2)
    assert read(root) == 2, "it cannot be written again"
    left = [path.name for path in root.rglob(".*") if path.name != MANIFEST]
    assert not left, left
    return "new" if found == 2 else "old"


def main() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # processes die here, not the machine
    print(json.dumps(enumerate_stops(Path(sys.argv[2]), sys.argv[3:])))


if __name__ == "__main__":
    main()
