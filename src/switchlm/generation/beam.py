"""Beam search: outputs of high probability, best first.

Every prompt has `width` open outputs of equal length. A step takes their 2 * width most probable
continuations (more if several tokens end an output): of the first `width`, those that end are
stored; the first `width` that do not end stay open (an output has at most one continuation per end
token that ends it, so there are enough). The score of an
output is its log probability / length ** length_penalty (Wu et al. 2016, with the plain length). A
prompt is done when no open output, at its present length, has a better score than the worst of
`width` ended ones.

Rules and tokens are those of transformers' `generate(num_beams=...)`.

Shapes: B prompts, W width, C candidates, S source, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.generation.cache import GrowingCache
from switchlm.generation.decode import (
    check_finite,
    check_prompts,
    decode_step,
    dropless,
    encode_prompts,
    evaluation_mode,
    limits_of,
    memories,
)
from switchlm.kernels.cpu.memory import available_bytes
from switchlm.model.transformer import SwitchTransformer

_IMPOSSIBLE = -1e9  # the log probability of open outputs that do not exist yet


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Options of beam search.

    width: open outputs per prompt; 1 is greedy.
    length_penalty: above 0 favours long outputs, below 0 short ones.
    early_stopping: end a prompt as soon as `width` of its outputs have ended.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"A beam search needs at least 1 beam, got {self.width}.")
        if not abs(self.length_penalty) <= 100:
            raise ConfigError(
                f"The length penalty must lie between -100 and 100, got {self.length_penalty}."
            )


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output: its tokens, the end token included where there is one, and its score.

    finished: false if the limit of tokens ended it.
    """

    tokens: list[int]
    score: float
    finished: bool


@torch.no_grad()
def beam_search(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    beams: Beams,
    encoder_capacity: bool = False,
) -> list[list[Output]]:
    """Return the `beams.width` best outputs of every prompt, the best first.

    The other arguments and the errors are those of decode.steps. Raises ConfigError if the
    beams cannot fit in memory, or the vocabulary has fewer tokens than candidates.
    """
    batch, width, config = inputs_BS.shape[0], beams.width, model.config
    limits = limits_of(max_new_tokens, batch)
    num_candidates = (1 + len(config.end_ids)) * width
    if num_candidates > config.vocabulary_size:
        raise ConfigError(
            f"{width} beams are too many for a vocabulary of {config.vocabulary_size} tokens: it "
            f"must have {1 + len(config.end_ids)} per beam."
        )
    check_prompts(model, inputs_BS, segments_BS)
    prompts = [_Prompt(beams, limit, config.end_ids) for limit in limits]
    device = inputs_BS.device
    tokens = torch.full((batch * width, 1), config.first_id, device=device)
    with evaluation_mode(model):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS, encoder_capacity)
        pairs = memories(model, encoded_BSD, segments_BS)
        needed = width * sum(part.nbytes for pair in pairs for part in pair)
        available = available_bytes() if encoded_BSD.is_cpu else None
        if available is not None and needed > available:
            raise ConfigError(
                f"{width} beams of {batch} prompts need {needed / 1e9:.1f} GB for the keys and "
                f"values of the prompts, but {available / 1e9:.1f} GB of memory are free. Take "
                "fewer beams, or fewer prompts at a time."
            )
        cross = [
            (keys.repeat_interleave(width, 0), values.repeat_interleave(width, 0))
            for keys, values in pairs
        ]
        segments = None if segments_BS is None else segments_BS.repeat_interleave(width, 0)
        cache = GrowingCache(cross, max(limits))
        with dropless(model.decoder):
            while True:
                logits_BV = decode_step(model, tokens, segments, cache)
                logits_BWV = logits_BV.float().unflatten(0, (batch, width))
                done_B = torch.tensor([prompt.done for prompt in prompts], device=device)
                check_finite(logits_BWV, done_B[:, None])
                score_BW = torch.tensor([prompt.scores for prompt in prompts], device=device)
                total_BWV = logits_BWV.log_softmax(-1) + score_BW[:, :, None]
                score_BC, place_BC = total_BWV.flatten(1).topk(num_candidates)  # beam * V + token
                for prompt, scores, places in zip(
                    prompts, score_BC.tolist(), place_BC.tolist(), strict=True
                ):
                    prompt.extend(scores, [divmod(place, logits_BWV.shape[2]) for place in places])
                if all(prompt.done for prompt in prompts):
                    return [prompt.best() for prompt in prompts]
                source_BW = torch.tensor([prompt.sources for prompt in prompts], device=device)
                first_B1 = torch.arange(batch, device=device)[:, None] * width
                cache.reorder((source_BW + first_B1).flatten())
                last = [output[-1] for prompt in prompts for output in prompt.open]
                tokens = torch.tensor(last, device=device)[:, None]


class _Prompt:
    """The outputs of one prompt.

    open: tokens of the outputs that have not ended.
    scores: their log probabilities, descending.
    sources: for each, the index of the open output that it continues.
    """

    def __init__(self, beams: Beams, limit: int, end_ids: Collection[int]) -> None:
        self.open: list[list[int]] = [[] for _ in range(beams.width)]
        self.scores = [0.0] + [_IMPOSSIBLE] * (beams.width - 1)
        self.sources = list(range(beams.width))
        self.done = False
        self._ended: list[Output] = []
        self._beams = beams
        self._limit = limit
        self._end_ids = end_ids

    def extend(self, scores: list[float], candidates: list[tuple[int, int]]) -> None:
        """Extend the open outputs by one token.

        candidates: (open output, token), the most probable first.
        """
        if self.done:
            return
        width, length = self._beams.width, len(self.open[0]) + 1
        divisor = length**self._beams.length_penalty
        continued: list[tuple[float, int, list[int]]] = []
        for rank, (score, (source, token)) in enumerate(zip(scores, candidates, strict=True)):
            tokens = [*self.open[source], token]
            finished = token in self._end_ids
            if not finished and len(continued) < width:
                continued.append((score, source, tokens))
            if (finished or length == self._limit) and rank < width:
                self._ended.append(Output(tokens=tokens, score=score / divisor, finished=finished))
        self._ended = self.best()
        self.scores = [score for score, _, _ in continued]
        self.sources = [source for _, source, _ in continued]
        self.open = [tokens for _, _, tokens in continued]
        full = len(self._ended) == width
        decided = full and self.scores[0] / divisor <= self._ended[-1].score
        self.done = length == self._limit or decided or (full and self._beams.early_stopping)

    def best(self) -> list[Output]:
        """Return the ended outputs of highest score."""
        ranked = sorted(self._ended, key=lambda output: -output.score)
        return ranked[: self._beams.width]
