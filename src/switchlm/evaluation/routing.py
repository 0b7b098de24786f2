"""The expert assignment: for every Switch layer, counts by expert and class, source and token.

The counts come from the `Routing` records of the model's output. Classes of tokens are the same for
vocabularies of bytes and of pieces: a byte has the class of its character, and the token before a
letter decides whether it starts a word.

Shapes: B batch, S source, T target, N tokens, K experts per token, A assignments, E experts,
C classes, M sources of the mixture, P parts of a row, W chosen assignments.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.decode import evaluation_mode
from switchlm.generation.text_stream import LONGEST_CHARACTER, REPLACEMENT, name_of
from switchlm.model.routing import Routing
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer, forward_batch, shift_right
from switchlm.parallel.mesh import ALONE, Mesh

CLASSES = (
    "word start",
    "inside a word",
    "number",
    "punctuation",
    "space",
    "mixed",
    "part of a character",
    "sentinel",
    "start or end",
)
_CLASS = {name: index for index, name in enumerate(CLASSES)}
_SENTINEL = re.compile(r"<extra_id_\d+>")
_OTHER_SPECIAL = re.compile(r"<pad>|</s>|<id \d+>")
_SPACE_MARKS = ("▁", "Ġ")  # the space before a word, in pieces


class TokenClasses:
    """Classifies rows of token ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._text = lru_cache(maxsize=2**16)(self._decode)
        self._has_mark = lru_cache(maxsize=2**16)(self._starts_with_mark)

    def of_rows(self, tokens_BS: Tensor) -> Tensor:
        """Return the index in CLASSES of every token, int64 [B, S] on the CPU."""
        rows = [list(self._of_row(row)) for row in tokens_BS.tolist()]
        return torch.tensor(rows, dtype=torch.int64).reshape(tokens_BS.shape)

    def _of_row(self, row: list[int]) -> Iterable[int]:
        before = "x"  # a row may begin within a word
        place = 0
        while place < len(row):
            length, text = self._character(row, place)
            name = token_class(text, before, marked=self._has_mark(row[place]))
            for offset in range(length):
                started = name == "word start" and offset > 0
                yield _CLASS["inside a word" if started else name]
            if name in ("sentinel", "part of a character"):
                before = "x"  # the text there is unknown
            else:
                before = text
            place += length

    def _character(self, row: list[int], place: int) -> tuple[int, str]:
        """Return the number of tokens of the character at `place`, and its text."""
        text = self._text((row[place],))
        if REPLACEMENT in text:
            for length in range(2, LONGEST_CHARACTER + 1):
                longer = self._text(tuple(row[place : place + length]))
                if REPLACEMENT not in longer:
                    return min(length, len(row) - place), longer
        return 1, text

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(ids) if len(ids) > 1 else _text(self.tokenizer, ids[0])

    def _starts_with_mark(self, token: int) -> bool:
        piece = self.tokenizer.backend.id_to_token(token) or ""
        return piece.startswith(_SPACE_MARKS)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, or a name such as `<0xE2>`."""
    text = _text(tokenizer, token)
    byte = tokenizer.byte(token) if REPLACEMENT in text else None
    return text if byte is None else f"<0x{byte:02X}>"


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token]) or name_of(token, tokenizer)


def token_class(text: str, before: str = "", marked: bool = False) -> str:
    """Return one of CLASSES for the text of a token (or of a character in several tokens).

    before: the text of the token before it.
    marked: whether the piece begins with a space, which `text` may lack: some tokenizers drop the
        first one.
    """
    bare = text.strip()
    if not bare:
        return "space"
    if _SENTINEL.fullmatch(bare):
        return "sentinel"
    if _OTHER_SPECIAL.fullmatch(bare):
        return "start or end"
    if REPLACEMENT in bare:
        return "part of a character"
    kinds = {unicodedata.category(character)[0] for character in bare}
    if kinds <= {"L", "M"}:
        starts = marked or text[0].isspace() or not _in_word(before[-1:])
        return "word start" if starts else "inside a word"
    if kinds == {"N"}:
        return "number"
    if kinds <= {"P", "S"}:
        return "punctuation"
    return "mixed"


def _in_word(character: str) -> bool:
    return bool(character) and unicodedata.category(character)[0] in "LM"


PARTS = 16  # of a row, for dropped_by_place


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """The expert assignment of one Switch layer, without padding.

    name: the module, such as `encoder.blocks.1.feedforward`.
    load_E: assignments to each expert, before dropping.
    class_load, source_load: the same for each class of tokens and each source of the text.
    top_tokens: for each expert its most frequent tokens, as (text, count).
    dropped: the share of assignments that were dropped.
    dropped_by_place: the share of tokens without an expert, in equal parts of the row.
    gate: the mean gate.
    """

    name: str
    load_E: tuple[int, ...]
    class_load: dict[str, tuple[int, ...]]
    source_load: dict[str, tuple[int, ...]]
    top_tokens: tuple[tuple[tuple[str, int], ...], ...]
    dropped: float
    dropped_by_place: tuple[float, ...]
    gate: float


def routing_statistics(
    model: SwitchTransformer,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    sources: Sequence[str] = (),
    *,
    top: int = 8,
    mesh: Mesh = ALONE,
) -> list[LayerRouting]:
    """Return the expert assignment of every Switch layer, in order; none for a dense model.

    batches: of this process; on several processes, each has its share.
    sources: the names that `Batch.source_B` indexes; without them there is no count by source.
    mesh: every process returns the counts of all, except for `top_tokens`, which are its own.

    The inputs of decoder layers are the targets shifted right. Capacity is as configured for
    evaluation.
    """
    names = list(switch_layers(model))
    if not names:
        return []
    counts = [_Counts(model.config.num_experts, len(sources)) for _ in names]
    classes = TokenClasses(tokenizer)
    device = model.embedding.weight.device
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            decoder_inputs_BT = shift_right(
                batch.targets_BT, batch.target_segments_BT, model.config.start_id
            )
            segments = (batch.input_segments_BS, batch.target_segments_BT)
            output = forward_batch(model, batch)
            tokens = [
                _Tokens.of(ids, segments_BS, batch.source_B, classes)
                for ids, segments_BS in zip(
                    (batch.inputs_BS, decoder_inputs_BT), segments, strict=True
                )
            ]
            for index, routing in enumerate(output.routing):
                counts[index].add(routing, tokens[index >= len(output.encoder_routing)])
    return [
        layer.summary(name, tokenizer, sources, top, mesh)
        for name, layer in zip(names, counts, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The input tokens of a stack, int64 or bool, on the CPU; part_N: of the row."""

    token_N: Tensor
    class_N: Tensor
    source_N: Tensor
    part_N: Tensor
    real_N: Tensor

    @classmethod
    def of(
        cls, tokens: Tensor, segments: Tensor | None, source_B: Tensor, classes: TokenClasses
    ) -> "_Tokens":
        tokens = tokens.cpu()
        length = tokens.shape[1]
        part = torch.arange(length) * PARTS // length
        real = (
            torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments.cpu() != 0
        )
        return cls(
            token_N=tokens.flatten(),
            class_N=classes.of_rows(tokens).flatten(),
            source_N=source_B.long().cpu().repeat_interleave(length),
            part_N=part.repeat(tokens.shape[0]),
            real_N=real.flatten(),
        )


class _Counts:
    """Running counts of one layer."""

    def __init__(self, num_experts: int, num_sources: int) -> None:
        self.class_CE = torch.zeros(len(CLASSES), num_experts, dtype=torch.int64)
        self.source_ME = torch.zeros(num_sources, num_experts, dtype=torch.int64)
        self.part_P2 = torch.zeros(PARTS, 2, dtype=torch.int64)  # tokens without, with expert
        self.pairs: Counter[tuple[int, int]] = Counter()  # (expert, token)
        self.kept_and_gate = torch.zeros(2, dtype=torch.float64)

    def add(self, routing: Routing, tokens: _Tokens) -> None:
        expert_A, kept_A = routing.expert_A.cpu(), routing.kept_A.cpu()
        num_tokens = tokens.token_N.numel()
        if routing.token_A is None:
            token_A = torch.arange(expert_A.numel()) // (expert_A.numel() // num_tokens)
            chosen_A = tokens.real_N[token_A]
        else:
            # With expert choice, assignments that were not kept were not chosen.
            token_A = routing.token_A.cpu()
            chosen_A = kept_A & tokens.real_N[token_A]
        expert_W, token_W = expert_A[chosen_A], token_A[chosen_A]
        _count(self.class_CE, tokens.class_N[token_W], expert_W)
        if self.source_ME.numel():
            _count(self.source_ME, tokens.source_N[token_W], expert_W)
        pairs = torch.stack([expert_W, tokens.token_N[token_W]])
        unique, numbers = pairs.unique(dim=1, return_counts=True)
        self.pairs.update(
            dict(zip(zip(*unique.tolist(), strict=True), numbers.tolist(), strict=True))
        )
        kept_N = torch.zeros(num_tokens, dtype=torch.bool)
        kept_N[token_A[kept_A]] = True
        _count(self.part_P2, tokens.part_N[tokens.real_N], (kept_N[tokens.real_N]).long())
        kept = (kept_A & chosen_A).sum().double()
        self.kept_and_gate += torch.stack([kept, routing.gate_A.cpu()[chosen_A].double().sum()])

    def summary(
        self, name: str, tokenizer: Tokenizer, sources: Sequence[str], top: int, mesh: Mesh
    ) -> LayerRouting:
        class_CE = mesh.all_reduce_sum(self.class_CE)
        source_ME = mesh.all_reduce_sum(self.source_ME)
        dropped_P, kept_P = mesh.all_reduce_sum(self.part_P2).unbind(1)
        kept, gate = mesh.all_reduce_sum(self.kept_and_gate).tolist()
        load_E = class_CE.sum(0)
        total = max(int(load_E.sum()), 1)
        top_tokens: list[list[tuple[str, int]]] = [[] for _ in load_E]
        for (expert, token), number in self.pairs.most_common():
            if len(top_tokens[expert]) < top:
                top_tokens[expert].append((token_text(tokenizer, token), number))
        return LayerRouting(
            name=name,
            load_E=tuple(load_E.tolist()),
            class_load=_named(CLASSES, class_CE),
            source_load=_named(sources, source_ME),
            top_tokens=tuple(map(tuple, top_tokens)),
            dropped=1 - kept / total if load_E.any() else 0.0,
            dropped_by_place=tuple((dropped_P / (dropped_P + kept_P).clamp(min=1)).tolist()),
            gate=gate / total,
        )


def _count(counts_IJ: Tensor, row_W: Tensor, column_W: Tensor) -> None:
    """Add one for each pair of row and column."""
    columns = counts_IJ.shape[1]
    found = torch.bincount(row_W * columns + column_W, minlength=counts_IJ.numel())
    counts_IJ += found.reshape(counts_IJ.shape)


def _named(names: Sequence[str], counts_IE: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the rows that are not empty, by name."""
    rows = zip(names, counts_IE.tolist(), strict=True)
    return {name: tuple(row) for name, row in rows if any(row)}
