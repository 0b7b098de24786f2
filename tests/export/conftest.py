import dataclasses

import pytest
import torch

from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


@pytest.fixture(scope="session")
def build():
    """Build a nano model whose greedy output is long and varied, with router options of choice."""

    def build(router=None, **changes):
        torch.manual_seed(3)
        changes = {"initialisation": Initialisation(scale=4.0), "tied_head": False, **changes}
        config = dataclasses.replace(preset("nano"), **changes)
        if router:
            config = dataclasses.replace(
                config, router=dataclasses.replace(config.router, **router)
            )
        return SwitchTransformer(config).eval()

    return build
