"""What a student reads, text or the examples of tasks, and what its teacher says of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchlm.data.loader import Loader, open_data
from switchlm.data.pairs import PairLoader
from switchlm.data.tokenizer import Tokenizer
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import AnyMesh
from switchlm.parallel.whole import whole
from switchlm.recipes.distill_config import DistillRun
from switchlm.recipes.finetune import Examples, read_tasks, scorer
from switchlm.recipes.finetune_config import FinetuneRun
from switchlm.recipes.finetune_model import check_spelling
from switchlm.training.distillation import Taught, Teacher
from switchlm.training.logit_cache import CacheKey, LogitCache, build, digest
from switchlm.training.loop import BatchSource

Report = Callable[[str], None]
Figures = dict[str, Any]


class Reading:
    """The data of a distillation.

    loader: the batches of all processes together. examples: of the tasks; None where it is text.
    """

    def __init__(self, config: DistillRun, tokenizer: Tokenizer, report: Report) -> None:
        self.config = config
        self.examples: Examples | None = None
        self.loader: Loader | PairLoader
        settings = config.finetune
        if settings is None:
            self.loader = open_data(
                config.run.data, seed=config.run.training.seed, tokenizer=tokenizer, report=report
            )
            return
        self.examples = read_tasks(settings)
        check_spelling(self.examples.tasks, tokenizer, settings.model)
        self.loader = PairLoader(
            self.examples.train,
            tokenizer,
            input_length=settings.input_length,
            target_length=settings.target_length,
            batch_size=settings.batch_size,
            seed=config.run.training.seed,
            held_out=self.examples.validation,
            pack=settings.pack,
            long_targets="truncate" if settings.truncate_targets else "refuse",
            report=report,
        )

    def score(self, model: SwitchTransformer, mesh: AnyMesh) -> Figures:
        """Return score and scores of a model on the tasks, in per cent; nothing for text."""
        if self.config.finetune is None or self.examples is None:
            return {}
        training = self.config.run.training
        every = training.evaluate_every or training.steps
        run = FinetuneRun(
            finetune=self.config.finetune,
            model=model.config,
            training=replace(training, evaluate_every=every),
        )
        assert isinstance(self.loader, PairLoader)
        figures = scorer(run, self.examples, self.loader, mesh)(whole(model))
        return {name: figures[name] for name in ("score", "scores")}


def taught(
    reading: Reading,
    model: SwitchTransformer,
    mesh: AnyMesh,
    should_stop: Callable[[], bool],
    report: Report,
) -> BatchSource | None:
    """Return this process's share of the batches, with what the teacher says of them.

    A cache that is not there yet is made first; None if the user stopped that.
    """
    settings, training = reading.config.distillation, reading.config.run.training
    loader = reading.loader
    share = loader.share(mesh.share, mesh.num_shares)
    if not settings.soft_weight:
        return share
    teacher = Teacher(
        model,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.num_words,
    )
    if settings.cache_logits is None:
        return Taught(share, lambda number, batch: teacher(batch))
    assert settings.num_words is not None, "a cache implies it"
    folder = Path(settings.cache_logits)
    num_batches = training.steps * training.accumulate
    key = CacheKey(
        teacher=digest(model),
        tokenizer=loader.tokenizer.fingerprint(),
        seed=training.seed,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.num_words,
    )
    with mesh.first_on_node("logits"):
        build(folder, key, teacher, loader, num_batches, should_stop, report)
    if mesh.any(not folder.exists()):
        return None
    cache = LogitCache(
        folder,
        key,
        num_batches * loader.batch_size,
        share=mesh.share,
        num_shares=mesh.num_shares,
    )
    source = Taught(share, cache.teach)
    batches = source.iterate(0)
    next(batches)  # other text is refused now, before there is a run
    batches.close()
    return source
