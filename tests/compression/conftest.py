import dataclasses

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


@pytest.fixture
def made():
    """Build a nano model, every capacity large enough."""

    def made(**changes):
        torch.manual_seed(0)
        router = dataclasses.replace(
            preset("nano").router, capacity_factor=None, evaluation_capacity_factor=None
        )
        config = dataclasses.replace(preset("nano"), router=router, **changes)
        return SwitchTransformer(config).eval()

    return made


@pytest.fixture
def batches():
    """Two batches of random tokens, full rows."""
    torch.manual_seed(1)

    def batch():
        return Batch(
            inputs_BS=torch.randint(3, 259, (8, 32)),
            targets_BT=torch.randint(3, 259, (8, 16)),
            input_segments_BS=torch.ones(8, 32, dtype=torch.int32),
            target_segments_BT=torch.ones(8, 16, dtype=torch.int32),
            source_B=torch.zeros(8, dtype=torch.int32),
        )

    return [batch(), batch()]
