"""A decoding batch in which requests are added and removed between steps: continuous batching.

Memory is allocated once, for a fixed number of slots of fixed lengths. Occupied slots are always
the first, so a step computes on views of these rows and copies nothing; when a row is removed, the
last one is moved there. Every row has its own position and random generator, so its output does not
depend on the other rows.

Shapes: N slots, B occupied, H heads, S source, M output positions, K head width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchlm.generation.decode import encode_prompts, finite_rows, pad_prompts, rows_at_once
from switchlm.generation.sampling import Sampling, next_tokens, uniforms
from switchlm.kernels.cpu.memory import available_bytes
from switchlm.model.attention import KeysValues, KeyValueStore
from switchlm.model.transformer import SwitchTransformer

STEP = 32  # lengths are rounded up to multiples of this, for few shapes


@dataclass(frozen=True)
class _Occupant:
    request: Any
    sampling: Sampling
    uniform_M: Tensor | None


class _Window:
    """A DecodingCache (see model/transformer.py) of the rows first .. last - 1."""

    def __init__(self, slots: "Slots", first: int, last: int) -> None:
        rows = slice(first, last)
        self._position_B = slots.position_N[rows]
        positions = _rounded(int(self._position_B.max()) + 1, slots.max_target)
        self.source = _rounded(int(slots.source_N[rows].max()), slots.max_source)
        self._positions_M = slots.positions_M[:positions]
        self.self_attention: list[KeyValueStore] = [
            _Store(keys[rows, :, :positions], values[rows, :, :positions], self._position_B)
            for keys, values in slots.own
        ]
        self.cross_attention: list[KeysValues] = [
            (keys[rows, :, : self.source], values[rows, :, : self.source])
            for keys, values in slots.cross
        ]

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        assert num_new == 1, "slots decode one token at a time"
        return self._position_B[:, None], self._positions_M


class _Store:
    """One layer's keys and values; each row writes at its own position."""

    def __init__(self, keys_BHMK: Tensor, values_BHMK: Tensor, position_B: Tensor) -> None:
        self._kept = (keys_BHMK, values_BHMK)
        self._row_B = torch.arange(len(position_B), device=position_B.device)
        self._position_B = position_B

    def update(self, key_BHTK: Tensor, value_BHTK: Tensor) -> KeysValues:
        for kept_BHMK, new_BHTK in zip(self._kept, (key_BHTK, value_BHTK), strict=True):
            kept_BHMK[self._row_B, :, self._position_B] = new_BHTK[:, :, 0]
        return self._kept


class Slots:
    """A decoding batch of up to `num_slots` rows, for prompts and outputs of bounded length.

    Use it within `evaluation_mode(model, drop=False)`. Raises MemoryError for more slots than fit.

    requests: of the occupied rows, in order.
    """

    def __init__(
        self, model: SwitchTransformer, *, num_slots: int, max_source: int, max_target: int
    ) -> None:
        config, device = model.config, model.embedding.weight.device
        self.model = model
        self.num_slots, self.max_source, self.max_target = num_slots, max_source, max_target
        start_11 = torch.full((1, 1), config.first_id, device=device)
        sample = model.decoder.memories(encode_prompts(model, start_11, None))[0][0]

        numbers = num_slots * (max_source + max_target) * config.num_heads * config.d_kv
        needed = 2 * config.num_decoder_layers * numbers * sample.element_size()
        available = available_bytes() if sample.is_cpu else None
        if available is not None and needed > available:
            raise MemoryError(f"{needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free")

        def buffers(length: int) -> list[tuple[Tensor, Tensor]]:
            shape = (num_slots, config.num_heads, length, config.d_kv)
            return [
                (sample.new_zeros(shape), sample.new_zeros(shape))
                for _ in range(config.num_decoder_layers)
            ]

        self.own, self.cross = buffers(max_target), buffers(max_source)
        self.positions_M = torch.arange(max_target, device=device)
        self.position_N = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.source_N = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.segments_NS = torch.zeros(num_slots, max_source, dtype=torch.int32, device=device)
        self._token_N1 = torch.full((num_slots, 1), config.first_id, device=device)
        self._occupants: list[_Occupant] = []
        # The used length of every row: of the output, and of the source.
        self._used = [(0, 0)] * num_slots

    @property
    def requests(self) -> list[Any]:
        return [one.request for one in self._occupants]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, allocated at the start."""
        return sum(t.numel() * t.element_size() for pair in self.own + self.cross for t in pair)

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self._occupants)

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return encoded_SD of every prompt, end token included; see `encode_prompts`."""
        inputs_BS, segments_BS = pad_prompts(prompts, self.model.config.pad_id)
        device = self._token_N1.device
        inputs_BS, segments_BS = inputs_BS.to(device), segments_BS.to(device)
        encoded_BSD = encode_prompts(self.model, inputs_BS, segments_BS)
        return [row[: len(ids)] for row, ids in zip(encoded_BSD, prompts, strict=True)]

    def add(
        self, request: Any, encoded_SD: Tensor, *, sampling: Sampling, seed: int, limit: int
    ) -> None:
        """Add a request to a free slot.

        limit: of the tokens of the output, at most max_target.
        """
        length = encoded_SD.shape[0]
        assert self.num_free, "all slots are taken"
        assert length <= self.max_source, "the prompt is longer than a slot"
        assert limit <= self.max_target, "the output may be longer than a slot"
        row = len(self._occupants)
        memories = self.model.decoder.memories(encoded_SD[None])
        self._clear(row)
        self._used[row] = limit, length
        for kept, new in zip(self.cross, memories, strict=True):
            for kept_NHSK, new_1HSK in zip(kept, new, strict=True):
                kept_NHSK[row, :, :length] = new_1HSK[0]
        self.segments_NS[row] = 0
        self.segments_NS[row, :length] = 1
        self.source_N[row] = length
        self.position_N[row] = 0
        self._token_N1[row] = self.model.config.first_id
        uniform_M = None
        if sampling.temperature:
            uniform_M = uniforms([seed], limit)[0].to(self._token_N1.device)
        self._occupants.append(_Occupant(request, sampling, uniform_M))

    def remove(self, row: int) -> None:
        """Remove a row; the last one is moved there."""
        last = len(self._occupants) - 1
        if row != last:
            self._clear(row)
            self._used[row] = self._used[last]
            for kept_NHLK, used in self._kept(row):
                kept_NHLK[row, :, :used] = kept_NHLK[last, :, :used]
            for tensor in (self.segments_NS, self.source_N, self.position_N, self._token_N1):
                tensor[row] = tensor[last]
            self._occupants[row] = self._occupants[last]
        del self._occupants[last]

    def _kept(self, row: int) -> Iterator[tuple[Tensor, int]]:
        """Yield all keys and values, and the used length of the row in them."""
        for pairs, used in zip((self.own, self.cross), self._used[row], strict=True):
            yield from ((tensor, used) for pair in pairs for tensor in pair)

    def _clear(self, row: int) -> None:
        """Zero the used part of a row: a NaN left there would spread to the next request."""
        for kept_NHLK, used in self._kept(row):
            kept_NHLK[row, :, :used].zero_()

    def step(self, first: int = 0, last: int | None = None) -> list[int | None]:
        """Return the next token of rows `first` to before `last`, None where it is not finite.

        A step that raised may be repeated, for fewer rows too: it changes nothing until it returns.
        """
        last = len(self._occupants) if last is None else last
        most = rows_at_once(self.model) or last
        starts = range(first, last, most)
        logits_BV = torch.cat([self._logits(at, min(at + most, last)) for at in starts])
        token_B = self._choose(logits_BV, first)
        good = finite_rows(logits_BV).tolist()
        self._token_N1[first:last, 0] = token_B
        self.position_N[first:last] += 1
        return [token if fine else None for token, fine in zip(token_B.tolist(), good, strict=True)]

    def _logits(self, first: int, last: int) -> Tensor:
        window = _Window(self, first, last)
        output = self.model.decode(
            self._token_N1[first:last],
            window.cross_attention[0][0],
            input_segments_BS=self.segments_NS[first:last, : window.source],
            cache=window,
        )
        return output.logits_BTV[:, -1]

    def _choose(self, logits_BV: Tensor, first: int) -> Tensor:
        """Return token_B; rows of equal sampling options are computed together."""
        occupants = self._occupants[first : first + len(logits_BV)]
        kinds = {one.sampling for one in occupants}
        if len(kinds) == 1 and not occupants[0].sampling.temperature:
            return next_tokens(logits_BV, occupants[0].sampling, None)
        token_B = logits_BV.new_empty(len(logits_BV), dtype=torch.int64)
        position = self.position_N[first : first + len(logits_BV)].tolist()
        for sampling in kinds:
            rows = [row for row, one in enumerate(occupants) if one.sampling == sampling]
            draws = [(row, occupants[row].uniform_M) for row in rows]
            drawn = [one_M[position[row]] for row, one_M in draws if one_M is not None]
            uniform_B = torch.stack(drawn) if drawn else None
            token_B[rows] = next_tokens(logits_BV[rows], sampling, uniform_B)
        return token_B


def _rounded(length: int, most: int) -> int:
    return min(-(-length // STEP) * STEP, most)
