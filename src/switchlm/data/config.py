"""The `data` section of a configuration: sources, tokenizer, rows, masking and mixture."""

from dataclasses import dataclass
from typing import Literal

from switchlm.config import check_choices, parse_size
from switchlm.errors import ConfigError

LONGEST = 2**16  # tokens in a row; limits allocations
LARGEST_VOCABULARY = 2**24


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The fields of JSONL records and Parquet rows: the text, and its group."""

    text: str = "text"
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The settings of pre-training data.

    sources: each `[name=]location[:weight]`; a location is a file, a folder, a glob,
        `python:stdlib`, `python:site-packages` or `hub:NAME[:CONFIG][:SPLIT]`. `each:LOCATION`
        makes every file of a folder or glob a source of its own.
    tokenizer: `bytes`, `unigram` (trained on the mixture) or a path to a `tokenizer.json` or to the
        folder of one.
    vocabulary_size: of a trained tokenizer, sentinels included.
    input_length: tokens in a row of inputs, sentinels and the end token included.
    target_length: the most tokens in a row of targets; None takes the number that the inputs need.
    batch_size: rows in the global batch of a step.
    noise_density, mean_span: the share of tokens masked, and the mean length of a masked span.
    mixing: how often each source is drawn. `proportional` to its tokens, by `temperature`
        (proportional to tokens ** mixing_exponent; the exponent 0.3 is mT5's), or by `weights`.
        Weights in the sources take precedence over `proportional`.
    mixing_exponent: of `temperature`.
    held_out_share: the share of documents for evaluation, never trained on.
    pack: False cuts the concatenated documents into full rows (pre-training); True masks every
        document by itself and packs several into a row, separated by segments.
    text_column: the field of JSONL records and Parquet rows with the text.
    group_column: the field with the group of a record. Records with the same value in any source
        are all held out, or all trained on, as translations of one text should be.
    max_documents: read at most this number of documents of each source; None reads all.
    cache: folder of the token caches, see `switchlm cache`; None takes `~/.cache/switchlm`.
    cache_limit: size, such as 20GB, that the caches may have together: those used longest ago are
        deleted after a new one was made; None for no limit.
    """

    sources: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    vocabulary_size: int = 8192
    input_length: int = 512
    target_length: int | None = None
    batch_size: int = 32
    noise_density: float = 0.15
    mean_span: float = 3.0
    mixing: Literal["proportional", "temperature", "weights"] = "proportional"
    mixing_exponent: float = 0.3
    held_out_share: float = 0.01
    pack: bool = False
    text_column: str = "text"
    group_column: str | None = None
    max_documents: int | None = None
    cache: str | None = None
    cache_limit: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "data")
        self._check_range("input_length", 4, LONGEST)
        self._check_range("target_length", 4, LONGEST)
        self._check_range("batch_size", 1, 2**20)
        self._check_range("vocabulary_size", 512, LARGEST_VOCABULARY)
        self._check_range("max_documents", 1, 2**62)
        self._check_range("mean_span", 1.0, LONGEST)
        self._check_range("held_out_share", 0.0, 0.5)
        self._check_range("mixing_exponent", 0.0, 1.0)
        if not 0 < self.noise_density < 1:
            raise ConfigError(
                f"data.noise_density must lie between 0 and 1, got {self.noise_density}."
            )
        if self.cache_limit is not None:
            parse_size(self.cache_limit, "data.cache_limit")
        for name in ("text_column", "group_column"):
            if getattr(self, name) == "":
                raise ConfigError(f"data.{name} must name a field, got an empty string.")

    @property
    def columns(self) -> Columns:
        return Columns(text=self.text_column, group=self.group_column)

    def _check_range(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"data.{name} must lie in [{least}, {most}], got {value}.")
