"""Start or resume a run: one process at a time, settings written once and verified from then on.

A new run writes, after everything is checked, and each file atomically:
1. start.json: its settings, and hashes of its text and vocabulary. Where it is and no config.yaml,
   the files of step 2 are those of a start that was killed.
2. The tokenizer, and what the recipe adds.
3. config.yaml: from now on there is a run to resume.
A start that fails before the first line of metrics or checkpoint deletes them; one that is killed
leaves them to the next start.

A resumed run compares these with its own. Settings of the course of training may change, which is
said; others may not, since a run with other data or another model is another run. A run in which no
step is left only finishes what a kill may have kept it from; it takes no other course.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from switchlm.checkpoint.collective import Ranks
from switchlm.config import read_yaml, to_mapping, write_yaml
from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
from switchlm.errors import ConfigError, DataError
from switchlm.files import Report, new_folder, replace_file
from switchlm.huggingface.adapters import check_adapters
from switchlm.huggingface.save import check_replaceable
from switchlm.locks import exclusive
from switchlm.model.config import upgrade_model_section
from switchlm.parallel.mesh import Mesh
from switchlm.training.run_folder import RunFolder

Sections = Mapping[str, Any]

# Settings that a resumed run may change, all those below a name included.
FREE = (
    "training.steps", "training.seconds", "training.log_every", "training.evaluate_every",
    "training.evaluate_batches", "training.checkpoint_every", "training.keep_checkpoints",
    "training.device", "data.cache", "data.cache_limit",
    "training.tensorboard", "training.wandb", "training.compile",
    "training.activation_checkpointing", "training.learning_rate", "training.schedule",
    "training.warmup_steps", "training.decay_steps", "training.gradient_clip",
    "training.weight_decay", "mesh", "kernels", "finetune.patience", "distillation.baseline",
    "distillation.cache_logits",
)  # fmt: skip
COURSE = {  # settings that mean nothing to a run in which no step is left
    "training.seconds", "training.learning_rate", "training.schedule", "training.warmup_steps",
    "training.decay_steps", "training.gradient_clip", "training.weight_decay", "finetune.patience",
}  # fmt: skip
PURPOSES = {"data", "finetune", "distillation"}  # sections that tell the commands apart
MAY_CHANGE = (
    "training.steps, seconds, learning_rate and its schedule, log_every, evaluate_every, "
    "checkpoint_every, and the sections mesh and kernels"
)


@contextmanager
def open_run(out: Path, resume: bool, mesh: Mesh) -> Iterator["Run"]:
    """Lock the folder of a run for the block, in the main process.

    Raises ConfigError, on all ranks, if another process has it, if a run exists there and `resume`
    is False, or if a new run would replace files that are not those of a run.
    """
    folder = RunFolder(out)
    with ExitStack() as held:
        ranks = Ranks(mesh.storage)
        is_new = ranks.on_rank_zero(lambda: held.enter_context(_locked(folder, resume)))
        yield Run(folder, ranks, is_new)


@contextmanager
def _locked(folder: RunFolder, resume: bool) -> Iterator[bool]:
    """Yield whether the run is new.

    If the block fails before the run makes progress, a new run is deleted, and a resumed one has
    its settings back.
    """
    with exclusive(folder.root):
        is_new = not folder.exists()
        if not is_new and not resume:
            raise ConfigError(
                f"There is a run in {str(folder.root)!r} already. Go on with it by --resume, or "
                "choose another --out."
            )
        if is_new:
            left = folder.beginning() if folder.start.exists() else ()  # by a start that was killed
            for path in folder.paths():
                if path not in left:
                    raise ConfigError(
                        f"Will not write a run into {str(folder.root)!r}: it holds {path.name!r}, "
                        "which is not of this run. Choose another --out, or move that away."
                    )
            folder.clear()
        folder.sweep()
        check_replaceable(folder.model)
        check_adapters(folder.adapters)
        progress = folder.progress()
        settings = {path: path.read_bytes() for path in folder.settings() if path.is_file()}
        try:
            yield is_new
        except BaseException:
            if is_new and not any(folder.progress()):
                folder.clear()
            elif folder.progress() == progress:
                for path, content in settings.items():
                    if path.read_bytes() != content:
                        replace_file(path, content)
            raise


class Run:
    """A run whose folder is locked.

    is_new: whether this is its first start.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, is_new: bool) -> None:
        self.folder, self.is_new = folder, is_new
        self._ranks = ranks

    def tokenizer(self, vocabulary: Vocabulary) -> Tokenizer | None:
        """Return the run's own tokenizer, None if it has none; DataError if it is damaged."""
        place = self.folder.tokenizer
        if not place.exists():
            return None
        try:
            return Tokenizer.load(place, vocabulary)
        except DataError as error:
            raise DataError(
                f"{error} It is that of the run in {str(self.folder.root)!r}: copy the one of its "
                "model, or that of another run on the same text, to "
                f"{str(place / 'tokenizer.json')!r}."
            ) from None

    def check(self, settings: Mapping[str, Sections], report: Report) -> str | None:
        """Compare the settings with those of a resumed run, before anything is read or written.

        settings: the sections of each file, such as `config.yaml`.
        report: called with lines about settings that have changed, and about a run that has ended.

        Returns None, or a sentence on why these settings change nothing: then the run has ended,
        and is left as it is.

        Raises ConfigError for those that may not.
        """
        if self.is_new:
            return None
        changed: dict[str, tuple[Any, Any]] = {}
        text = self._started().get("text")
        for path in self.folder.settings():
            before = settings_of_run(self.folder, path.name)
            now = to_mapping(settings.get(path.name, {}))
            if not before and path == self.folder.config:
                raise ConfigError(
                    f"The run in {str(self.folder.root)!r} has no {path.name}, so its settings are "
                    "not known. Put the file back, or choose another --out for a new run."
                )
            if (before.keys() ^ now.keys()) & PURPOSES:
                raise ConfigError(
                    f"The run in {str(self.folder.root)!r} was started by another command than "
                    "this one: choose another --out, or the command that started it."
                )
            changed |= differences(before, now)
        if text is not None:  # then the text itself is compared, wherever it lies now
            changed.pop("data.sources", None)
        fixed = {name: pair for name, pair in changed.items() if not _is_free(name)}
        if fixed:
            raise ConfigError(
                f"The run in {str(self.folder.root)!r} cannot be resumed with other settings: "
                f"{_describe(fixed)}. Leave them out to go on; {MAY_CHANGE} may change. Or choose "
                "another --out for a new run, which may start from this one's model by --init-from."
            )
        training = settings.get(self.folder.config.name, {}).get("training", {})
        done = self._ranks.on_rank_zero(self.folder.done)
        ended = why_ended(done, training)
        if ended is not None:
            ended = f"The run in {str(self.folder.root)!r} {ended}"
            course = COURSE if done["step"] == training["steps"] else {*COURSE, "training.steps"}
            if changed.keys() & course:
                return f"{ended}: nothing was trained, and its files are as they were."
        if self._ranks.is_first:
            if changed:
                report(f"Resuming with other settings: {_describe(changed)}.")
            if ended is not None:
                report(f"{ended}: nothing is left to train.")
        return None

    def begin(
        self,
        settings: Mapping[str, Sections],
        tokenizer: Tokenizer,
        *,
        text: str,
        extra: Callable[[], None] = lambda: None,
    ) -> None:
        """Write what a new run begins with; compare the text and tokenizer of a resumed one.

        text: a hash of all examples.
        extra: writes, or verifies, files of the recipe's own.

        Raises ConfigError on all ranks if the text or the tokenizer is another.
        """

        def work() -> None:
            write = self._write if self.is_new else self._verify
            write(settings, tokenizer, text, extra)

        self._ranks.on_rank_zero(work)

    def _write(
        self,
        settings: Mapping[str, Sections],
        tokenizer: Tokenizer,
        text: str,
        extra: Callable[[], None],
    ) -> None:
        folder = self.folder
        record = {
            "settings": {name: to_mapping(one) for name, one in settings.items()},
            "text": text,
            "vocabulary": hash_of_vocabulary(tokenizer),
        }
        replace_file(folder.start, (json.dumps(record, indent=1) + "\n").encode())
        with new_folder(folder.tokenizer, "tokenizer") as partial:
            tokenizer.save(partial)
        extra()
        for name in sorted(settings, key=lambda name: name == folder.config.name):
            write_yaml(folder.root / name, settings[name])

    def _verify(
        self,
        settings: Mapping[str, Sections],
        tokenizer: Tokenizer,
        text: str,
        extra: Callable[[], None],
    ) -> None:
        folder, began = self.folder, self._started()
        for what, found in (("text", text), ("vocabulary", hash_of_vocabulary(tokenizer))):
            if began.get(what, found) != found:
                raise ConfigError(
                    f"The {what} is not the one that the run in {str(folder.root)!r} began with, "
                    f"so it cannot be resumed: its next batches would be others. Put the old "
                    f"{what} back, or start a new run in another --out from this one's model, with "
                    "--init-from."
                )
        extra()
        for name, sections in settings.items():
            path = folder.root / name
            if not path.is_file() or read_yaml(path) != to_mapping(sections):
                write_yaml(path, sections)

    def _started(self) -> Sections:
        return started(self.folder)


def started(folder: RunFolder) -> dict[str, Any]:
    """Return the content of start.json; nothing for a run of an earlier version."""
    if not folder.start.is_file():
        return {}
    try:
        content = json.loads(folder.start.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{str(folder.start)!r} is damaged: {error}. Delete it to resume without comparing "
            "what the run began with."
        ) from None
    return content


def settings_of_run(folder: RunFolder, name: str = "config.yaml") -> dict[str, Any]:
    """Return the sections of a run's config.yaml, or of another of its files.

    If the file is missing they are those that the run began with; nothing where there is no run.
    Raises ConfigError for a file that lacks some of these.
    """
    path = folder.root / name
    began = started(folder).get("settings", {}).get(name, {})
    if not path.is_file():
        return dict(began)
    try:
        found = read_yaml(path)
    except ConfigError as error:
        hint = f" Delete it to go on with the settings of {folder.start.name}." if began else ""
        raise ConfigError(f"{error}{hint}") from None
    lost = [key for key in leaves(began) if key not in set(leaves(found))]
    if lost:
        raise ConfigError(
            f"{str(path)!r} lacks {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}, which "
            "the run began with: it was cut or edited. Put these back, or delete the file to go on "
            f"with the settings of {folder.start.name}."
        )
    return found


def why_ended(done: Mapping[str, Any], training: Sections) -> str | None:
    """Return why a run takes no further step, as the end of a sentence; None if it does.

    done: of `RunFolder.done`.
    training: the section of the settings.
    """
    if not done:
        return None
    steps, seconds = training["steps"], training.get("seconds")
    if done["step"] >= steps:
        return f"has {done['step']:,} steps already, and training.steps is {steps:,}"
    if seconds is not None and done["seconds"] >= seconds:
        return f"has trained {done['seconds']:,.1f} s already, and training.seconds is {seconds:g}"
    if done["stopped"]:
        return f"ended at step {done['step']:,}, since its score no longer improved"
    return None


def hash_of_vocabulary(tokenizer: Tokenizer) -> str:
    """Return a hash of the pieces and their ids."""
    pieces = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def leaves(sections: Sections, path: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for key, value in sections.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, name)
        else:
            yield name


def differences(before: Sections, now: Sections, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by dotted name: (before, now).

    What `before` lacks was added by a later version, and does not differ.
    """
    if not path and isinstance(before.get("model"), dict):
        before = {**before, "model": upgrade_model_section(before["model"])}
    found: dict[str, tuple[Any, Any]] = {}
    for key in now.keys() & before.keys():
        name = f"{path}.{key}" if path else key
        old, new = before[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, name)
        elif old != new and not _same_number(old, new):
            found[name] = (old, new)
    return dict(sorted(found.items()))


def _same_number(old: Any, new: Any) -> bool:
    """Return whether a number was written by hand, such as 1e-3, which YAML reads as a text."""
    try:
        return not isinstance(new, str) and float(old) == new
    except (TypeError, ValueError):
        return False


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def _describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    parts = [f"{name} {now!r} (the run has {before!r})" for name, (before, now) in changed.items()]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
