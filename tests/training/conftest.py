"""A tiny model and a tiny loader for training tests."""

import random
from collections.abc import Callable, Generator

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer

VOCABULARY = 24


class CountingLoader:
    """Batches of counting sequences, a pure function of (seed, step); what a Loader gives."""

    sources = ("up", "down")
    tokenizer = None

    def __init__(self, seed: int = 0, rows: int = 8, source: int = 12, target: int = 6) -> None:
        self.seed, self.rows, self.shape = seed, rows, (source, target)
        self.read: list[int] = []

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        noise = torch.Generator().manual_seed(self.seed * 10_000 + step)
        source, target = self.shape
        start_B = torch.randint(0, VOCABULARY - 2, (self.rows, 1), generator=noise)
        source_B = torch.randint(0, 2, (self.rows,), generator=noise, dtype=torch.int32)
        direction_B = 1 - 2 * source_B[:, None]
        count = torch.arange(source + target)
        tokens = 2 + (start_B + direction_B * count) % (VOCABULARY - 2)
        segments_BT = torch.ones(self.rows, target, dtype=torch.int32)
        segments_BT[0, target // 2 :] = 0
        self.read.append(step)
        return Batch(
            inputs_BS=tokens[:, :source].contiguous(),
            targets_BT=tokens[:, source:].contiguous(),
            input_segments_BS=torch.ones(self.rows, source, dtype=torch.int32),
            target_segments_BT=segments_BT,
            source_B=source_B,
        )

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        step = start_step
        while True:
            yield step, self.batch(step)
            step += 1

    def held_out(self, num_batches: int) -> list[Batch]:
        return [self.batch(1_000_000 + index) for index in range(num_batches)]


def tiny_config(**changes: object) -> ModelConfig:
    router = changes.pop("router", RouterConfig())
    shape: dict[str, object] = {
        "vocabulary_size": VOCABULARY,
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_heads": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_experts": 4,
        "router": router,
    }
    return ModelConfig(**{**shape, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def text_loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """The real pipeline over two small sources."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for source in ("red", "blue"):
        (folder / source).mkdir()
        for document in range(20):
            text = " ".join(f"{source}{words.randrange(30)}" for _ in range(120))
            (folder / source / f"{document}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(
        sources=(f"red={folder / 'red'}:0.7", f"blue={folder / 'blue'}:0.3"),
        mixing="weights",
        input_length=48,
        batch_size=4,
        held_out_share=0.2,
    )
    return open_data(config, seed=0, cache_dir=folder / "cache")


@pytest.fixture
def loader() -> CountingLoader:
    return CountingLoader()


@pytest.fixture
def build() -> Callable[..., SwitchTransformer]:
    """Returns a function that builds the same tiny model, with changes to its configuration."""

    def make(seed: int = 0, **changes: object) -> SwitchTransformer:
        torch.manual_seed(seed)
        return SwitchTransformer(tiny_config(**changes))

    return make
