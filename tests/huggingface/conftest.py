"""Small random models of transformers, and how to compare them with ours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def their_switch() -> Callable[..., nn.Module]:
    """Build transformers' Switch model; keywords override the fields of its configuration."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def build(**fields: Any) -> nn.Module:
        defaults = {
            "vocab_size": 48,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_heads": 2,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 3,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        }
        config = transformers.SwitchTransformersConfig(**{**defaults, **fields})
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        # With an untied head, transformers unties the embeddings of the stacks too.
        model.set_input_embeddings(model.shared)
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
        return perturb(model)

    return build


@pytest.fixture(scope="session")
def their_t5() -> Callable[..., nn.Module]:
    """Build transformers' dense T5; keywords override the fields of its configuration."""
    transformers = pytest.importorskip("transformers")

    def build(**fields: Any) -> nn.Module:
        defaults = {
            "vocab_size": 48,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_heads": 2,
            "num_layers": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        }
        fields = {**defaults, **fields}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields))
        if fields.get("tie_word_embeddings") is False:
            model.lm_head.weight = nn.Parameter(
                torch.randn(fields["vocab_size"], fields["d_model"])
            )
        return perturb(model)

    return build


@torch.no_grad()
def perturb(model: nn.Module) -> nn.Module:
    """Change every weight, norms included, so that swapped tensors are detected."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def theirs_on_disk(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Save one of transformers' models as transformers does."""

    def save(model: Any) -> Path:
        folder = tmp_path / f"theirs-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Tensor, Tensor, str], None]:
    """Compare to 1e-5 of the largest number."""

    def check(ours: Tensor, theirs: Tensor, what: str) -> None:
        error = (ours - theirs).abs().max().item()
        assert error <= 1e-5 * max(theirs.abs().max().item(), 1e-3), f"{what}: off by {error}"

    return check
