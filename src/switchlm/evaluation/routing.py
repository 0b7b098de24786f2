"""The expert assignment: for every Switch layer, counts by expert and class, source and token.

All of it is read off the `Routing` record of the model's own output. Classes of tokens are letters,
digits, signs, spaces, sentinels and starts of words. Vocabularies of bytes and of pieces get the
same ones: a byte of a longer character is of the class of its character, and whether a letter
starts a word is decided by the token before it.

Shapes: B batch, S source, T target, N tokens, K experts per token, A assignments, E experts,
C classes, M sources of the mixture, P places in a row.
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
from switchlm.generation.text_stream import LONGEST_CHARACTER, REPLACEMENT
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
_SPACE_MARKS = ("▁", "Ġ")  # how pieces write the space before a word


class TokenClasses:
    """Classifies rows of token ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._text = lru_cache(maxsize=2**16)(self._decode)
        self._has_mark = lru_cache(maxsize=2**16)(self._starts_with_mark)

    def of_rows(self, tokens_BS: Tensor) -> Tensor:
        """Return int64 [B, S] on the CPU: the index in CLASSES of every token."""
        rows = [list(self._of_row(row)) for row in tokens_BS.tolist()]
        return torch.tensor(rows, dtype=torch.int64).reshape(tokens_BS.shape)

    def _of_row(self, row: list[int]) -> Iterable[int]:
        before = "x"  # a row may begin anywhere, so its first letters start no word
        place = 0
        while place < len(row):
            length, text = self._character(row, place)
            name = token_class(text, before, marked=self._has_mark(row[place]))
            for offset in range(length):
                started = name == "word start" and offset > 0
                yield _CLASS["inside a word" if started else name]
            if name in ("sentinel", "part of a character"):
                before = "x"  # what stood there is unknown
            else:
                before = text
            place += length

    def _character(self, row: list[int], place: int) -> tuple[int, str]:
        """Return how many tokens from `place` on make up whole characters, and their text."""
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
    """Return how a token reads; what has no text of its own has a name, as in `<0xE2>`."""
    text = _text(tokenizer, token)
    byte = tokenizer.byte(token) if REPLACEMENT in text else None
    return text if byte is None else f"<0x{byte:02X}>"


def _text(tokenizer: Tokenizer, token: int) -> str:
    named = {tokenizer.pad_id: "<pad>", tokenizer.end_id: "</s>"}
    return named.get(token) or tokenizer.decode([token]) or f"<id {token}>"


def token_class(text: str, before: str = "", marked: bool = False) -> str:
    """Return one of CLASSES for the text of a token (or of a character in several tokens).

    before: the text of the token before it.
    marked: whether the piece begins with a space that `text` may lack, since some tokenizers drop
        the first one.
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


PLACES = 16  # that the rows are divided into, to see where tokens are dropped


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """What one Switch layer did with a text; padding is left out everywhere.

    name: the module, such as `encoder.blocks.1.feedforward`.
    load_E: assignments to each expert, before dropping.
    class_load, source_load: the same for each class of tokens and each source of the text.
    top_tokens: for each expert its most frequent tokens as (text, count).
    dropped: the share of assignments that capacity dropped.
    dropped_by_place: the share of tokens that no expert took, in equal parts of the row from its
        start to its end.
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
    """Return a record for every Switch layer, in layer order; none for a dense model.

    Encoder layers see the inputs, decoder layers the targets shifted right. Capacity is as
    configured for evaluation.

    sources: the names that `Batch.source_B` indexes; without them there is no count by source. On
        many processes each gives its share of the batches, and all get the counts of all, but for
        `top_tokens`, which are of the process's own share.
    """
    names = list(switch_layers(model))
    if not names:
        return []
    tallies = [_Tally(model.config.num_experts, len(sources)) for _ in names]
    classes = TokenClasses(tokenizer)
    device = model.embedding.weight.device
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            decoder_inputs_BT = shift_right(
                batch.targets_BT, batch.target_segments_BT, model.config.pad_id
            )
            segments = (batch.input_segments_BS, batch.target_segments_BT)
            output = forward_batch(model, batch)
            seen = [
                _Tokens.of(tokens, part, batch.source_B, classes)
                for tokens, part in zip((batch.inputs_BS, decoder_inputs_BT), segments, strict=True)
            ]
            for index, routing in enumerate(output.routing):
                tallies[index].add(routing, seen[index >= len(output.encoder_routing)])
    return [
        tally.summary(name, tokenizer, sources, top, mesh)
        for name, tally in zip(names, tallies, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What is known of the tokens of a stack, each int64 or bool [N] on the CPU."""

    token_N: Tensor
    class_N: Tensor
    source_N: Tensor
    place_N: Tensor
    real_N: Tensor

    @classmethod
    def of(
        cls, tokens: Tensor, segments: Tensor | None, source_B: Tensor, classes: TokenClasses
    ) -> "_Tokens":
        tokens = tokens.cpu()
        length = tokens.shape[1]
        place = torch.arange(length) * PLACES // length
        real = (
            torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments.cpu() != 0
        )
        return cls(
            token_N=tokens.flatten(),
            class_N=classes.of_rows(tokens).flatten(),
            source_N=source_B.long().cpu().repeat_interleave(length),
            place_N=place.repeat(tokens.shape[0]),
            real_N=real.flatten(),
        )


class _Tally:
    """Running counts of one layer."""

    def __init__(self, num_experts: int, num_sources: int) -> None:
        self.class_CE = torch.zeros(len(CLASSES), num_experts, dtype=torch.int64)
        self.source_ME = torch.zeros(num_sources, num_experts, dtype=torch.int64)
        self.place_P2 = torch.zeros(PLACES, 2, dtype=torch.int64)  # by no expert; by some
        self.tokens: Counter[tuple[int, int]] = Counter()  # (expert, token)
        self.kept_and_gate = torch.zeros(2, dtype=torch.float64)

    def add(self, routing: Routing, seen: _Tokens) -> None:
        expert_A, kept_A = routing.expert_A.cpu(), routing.kept_A.cpu()
        num_tokens = seen.token_N.numel()
        if routing.token_A is None:
            token_A = torch.arange(expert_A.numel()) // (expert_A.numel() // num_tokens)
            wanted_A = seen.real_N[token_A]
        else:
            # Experts chose: what they did not keep, they did not want.
            token_A = routing.token_A.cpu()
            wanted_A = kept_A & seen.real_N[token_A]
        expert_W, token_W = expert_A[wanted_A], token_A[wanted_A]
        _count(self.class_CE, seen.class_N[token_W], expert_W)
        if self.source_ME.numel():
            _count(self.source_ME, seen.source_N[token_W], expert_W)
        pairs = torch.stack([expert_W, seen.token_N[token_W]])
        unique, numbers = pairs.unique(dim=1, return_counts=True)
        self.tokens.update(
            dict(zip(zip(*unique.tolist(), strict=True), numbers.tolist(), strict=True))
        )
        taken_N = torch.zeros(num_tokens, dtype=torch.bool)
        taken_N[token_A[kept_A]] = True
        _count(self.place_P2, seen.place_N[seen.real_N], (taken_N[seen.real_N]).long())
        kept = (kept_A & wanted_A).sum().double()
        self.kept_and_gate += torch.stack([kept, routing.gate_A.cpu()[wanted_A].double().sum()])

    def summary(
        self, name: str, tokenizer: Tokenizer, sources: Sequence[str], top: int, mesh: Mesh
    ) -> LayerRouting:
        class_CE = mesh.all_reduce_sum(self.class_CE)
        source_ME = mesh.all_reduce_sum(self.source_ME)
        untaken_P, taken_P = mesh.all_reduce_sum(self.place_P2).unbind(1)
        kept, gate = mesh.all_reduce_sum(self.kept_and_gate).tolist()
        load_E = class_CE.sum(0)
        total = max(int(load_E.sum()), 1)
        top_tokens: list[list[tuple[str, int]]] = [[] for _ in load_E]
        for (expert, token), number in self.tokens.most_common():
            if len(top_tokens[expert]) < top:
                top_tokens[expert].append((token_text(tokenizer, token), number))
        return LayerRouting(
            name=name,
            load_E=tuple(load_E.tolist()),
            class_load=_named(CLASSES, class_CE),
            source_load=_named(sources, source_ME),
            top_tokens=tuple(map(tuple, top_tokens)),
            dropped=1 - kept / total if load_E.any() else 0.0,
            dropped_by_place=tuple((untaken_P / (untaken_P + taken_P).clamp(min=1)).tolist()),
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
