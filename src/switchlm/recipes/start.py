"""What a run starts from: the weights of another model, and with them its vocabulary."""

from collections.abc import Callable
from pathlib import Path

import torch

from switchlm.checkpoint.huggingface import load, load_tokenizer
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError
from switchlm.model.transformer import SwitchTransformer

Report = Callable[[str], None]


def open_whole(
    name: str, role: str, report: Report, device: torch.device | str = "cpu"
) -> tuple[SwitchTransformer, Tokenizer]:
    """Load a model that must bring its tokenizer; role: what it is to the run, for the error."""
    model, tokenizer = load(name, device=device, report=report)
    return model, _required(tokenizer, name, role)


def open_tokenizer(name: str, role: str) -> Tokenizer:
    """Load the tokenizer of a model that must have one."""
    return _required(load_tokenizer(name, report=lambda line: None), name, role)


def _required(tokenizer: Tokenizer | None, name: str, role: str) -> Tokenizer:
    if tokenizer is None:
        raise CheckpointError(
            f"The {role} {name!r} has no tokenizer.json, so there is no telling its tokens from "
            "text. Copy the one it was trained with into its folder."
        )
    return tokenizer


def check_vocabulary(own: Tokenizer, other: Tokenizer, own_name: str, other_name: str) -> None:
    """Raise CheckpointError unless the same ids mean the same in both."""
    mine, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (own, other))
    if mine == theirs:
        return
    example = sorted(mine.items() ^ theirs.items())[0][0]
    raise CheckpointError(
        f"{other_name} and {own_name} have different vocabularies ({len(theirs):,} and "
        f"{len(mine):,} tokens; {example!r} is not the same in both), so what one says of a token "
        "means nothing to the other. Take models that were trained with one tokenizer."
    )


def check_stated(stated: str, own: Tokenizer, own_name: str) -> None:
    """Raise ConfigError unless `data.tokenizer`, as stated, is the vocabulary of the weights."""
    if stated == "unigram":
        raise ConfigError(
            "data.tokenizer is 'unigram', a vocabulary to be trained, but the vocabulary is that "
            f"of {own_name}. Leave data.tokenizer out."
        )
    other = Tokenizer.bytes() if stated == "bytes" else Tokenizer.load(Path(stated))
    check_vocabulary(own, other, own_name, f"data.tokenizer {stated!r}")
