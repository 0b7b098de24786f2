import dataclasses

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


@pytest.fixture(scope="module")
def module_build():
    """Build a nano model whose greedy output is long and varied."""

    def build(seed=0, scale=4.0, router=None, tied_head=False, **changes):
        torch.manual_seed(seed)
        config = dataclasses.replace(
            preset("nano"),
            initialisation=Initialisation(scale=scale),
            tied_head=tied_head,
            **changes,
        )
        if router:
            router = dataclasses.replace(config.router, **router)
            config = dataclasses.replace(config, router=router)
        return SwitchTransformer(config).eval()

    return build


@pytest.fixture
def build(module_build):
    return module_build


@pytest.fixture
def prompts():
    """Prompts of unequal length."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 300, (length,), generator=generator).tolist() for length in (7, 12, 3, 9)
    ]


@pytest.fixture
def overflowing():
    """Make the logits of one row not finite from a decoding step on, as float16 may."""

    def overflowing(model, row, step):
        original, calls = model.decode, []

        def decode(token_B1, encoded_BSD, **options):
            output = original(token_B1, encoded_BSD, **options)
            if len(calls) >= step:
                output.logits_BTV[row] = float("nan")
            calls.append(1)
            return output

        model.decode = decode
        return model

    return overflowing


@pytest.fixture
def generating():
    """Make a model generate a given text, as UTF-8 byte tokens, for any input."""

    def generating(model, text):
        ids = [*Tokenizer.bytes().encode(text), 1]
        original, calls = model.decode, []

        def decode(token_B1, encoded_BSD, **options):
            output = original(token_B1, encoded_BSD, **options)
            output.logits_BTV.copy_(torch.zeros_like(output.logits_BTV))
            output.logits_BTV[..., ids[len(calls)]] = 1.0
            calls.append(1)
            return output

        model.decode = decode
        return model

    return generating
