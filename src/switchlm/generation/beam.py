"""Beam search: the outputs of highest probability that a narrow search finds, best first.

Every prompt keeps `width` open outputs, all of one length. A step looks at their 2 * width most
probable continuations: those among the first `width` that end are put aside, and the first `width`
that do not end go on (at most one continuation of an output ends it, so there are enough). An
output's score is its log probability over its length to the power of `length_penalty` (Wu et al.
2016, with the plain length); a prompt is done when no open output can beat the worst of `width`
ended ones at its present length.

These are the rules of transformers' `generate(num_beams=...)`, and its tokens; here a prompt's
outputs stand in lists of their own, so that no prompt depends on another.

Shapes: B prompts, W width, C = 2 * W candidates, S source, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.generation.decode import (
    StaticCache,
    check_finite,
    check_prompts,
    dropless,
    encode_prompts,
    evaluation_mode,
    limits_of,
)
from switchlm.model.transformer import SwitchTransformer

_IMPOSSIBLE = -1e9  # the log probability of open outputs that do not exist yet


@dataclass(frozen=True, kw_only=True)
class Beams:
    """How to search.

    width: open outputs per prompt; 1 is greedy.
    length_penalty: above 0 favours long outputs, below 0 short ones.
    early_stopping: a prompt is done as soon as `width` of its outputs have ended.
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

    finished: false where the limit of tokens cut it off.
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

    The other arguments and the errors are those of decode.steps. Raises ConfigError for a width
    that the vocabulary is too small for.
    """
    batch, width, config = inputs_BS.shape[0], beams.width, model.config
    limits = limits_of(max_new_tokens, batch)
    if 2 * width > config.vocabulary_size:
        raise ConfigError(
            f"{width} beams are too many for a vocabulary of {config.vocabulary_size} tokens: it "
            "must have two a beam."
        )
    check_prompts(model, inputs_BS, segments_BS)
    prompts = [_Prompt(beams, limit, config.end_id) for limit in limits]
    device = inputs_BS.device
    tokens = torch.full((batch * width, 1), config.pad_id, device=device)
    with evaluation_mode(model):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS, encoder_capacity)
        encoded = encoded_BSD.repeat_interleave(width, 0)
        segments = None if segments_BS is None else segments_BS.repeat_interleave(width, 0)
        cache = StaticCache(model, encoded, max(limits))
        with dropless(model.decoder):
            while True:
                output = model.decode(tokens, encoded, input_segments_BS=segments, cache=cache)
                logits_BWV = output.logits_BTV[:, -1].float().unflatten(0, (batch, width))
                if cache.length == 1:
                    check_finite(logits_BWV)
                score_BW = torch.tensor([prompt.scores for prompt in prompts], device=device)
                score_BC, place_BC = _candidates(logits_BWV, score_BW)
                for prompt, scores, places in zip(
                    prompts, score_BC.tolist(), place_BC.tolist(), strict=True
                ):
                    prompt.take(scores, [divmod(place, logits_BWV.shape[2]) for place in places])
                if all(prompt.done for prompt in prompts):
                    return [prompt.best() for prompt in prompts]
                source_BW = torch.tensor([prompt.sources for prompt in prompts], device=device)
                first_B1 = torch.arange(batch, device=device)[:, None] * width
                cache.reorder((source_BW + first_B1).flatten())
                last = [output[-1] for prompt in prompts for output in prompt.open]
                tokens = torch.tensor(last, device=device)[:, None]


def _candidates(logits_BWV: Tensor, score_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of the most probable continuations, and beam * V + token."""
    total_BWV = logits_BWV.log_softmax(-1) + score_BW[:, :, None]
    score_BC, place_BC = total_BWV.flatten(1).topk(2 * score_BW.shape[1])
    return score_BC, place_BC


class _Prompt:
    """The outputs of one prompt.

    open: tokens of the outputs that go on. scores: their log probabilities, falling. sources: which
    of the open ones before each of them continues.
    """

    def __init__(self, beams: Beams, limit: int, end_id: int) -> None:
        self.open: list[list[int]] = [[] for _ in range(beams.width)]
        self.scores = [0.0] + [_IMPOSSIBLE] * (beams.width - 1)
        self.sources = list(range(beams.width))
        self.done = False
        self._ended: list[Output] = []
        self._beams = beams
        self._limit = limit
        self._end_id = end_id

    def take(self, scores: list[float], candidates: list[tuple[int, int]]) -> None:
        """Go one token on.

        candidates: (open output, token), the most probable first.
        """
        if self.done:
            return
        width, length = self._beams.width, len(self.open[0]) + 1
        divisor = length**self._beams.length_penalty
        going: list[tuple[float, int, list[int]]] = []
        for rank, (score, (source, token)) in enumerate(zip(scores, candidates, strict=True)):
            tokens = [*self.open[source], token]
            finished = token == self._end_id
            if not finished and len(going) < width:
                going.append((score, source, tokens))
            if (finished or length == self._limit) and rank < width:
                self._ended.append(Output(tokens=tokens, score=score / divisor, finished=finished))
        self._ended = self.best()
        self.scores = [score for score, _, _ in going]
        self.sources = [source for _, source, _ in going]
        self.open = [tokens for _, _, tokens in going]
        full = len(self._ended) == width
        hopeless = full and self.scores[0] / divisor <= self._ended[-1].score
        self.done = length == self._limit or hopeless or (full and self._beams.early_stopping)

    def best(self) -> list[Output]:
        """Return the ended outputs of highest score."""
        ranked = sorted(self._ended, key=lambda output: -output.score)
        return ranked[: self._beams.width]
