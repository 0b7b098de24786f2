"""The one training loop: batches in, metrics lines out, a checkpoint now and then.

A run is a pure function of (configuration, seed): noise and batch of a step depend on (seed, step),
and a checkpoint holds all other state. So a resumed run equals an uninterrupted one, bit for bit on
a CPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from switchlm.checkpoint.store import CheckpointStore
from switchlm.data.batch import Batch, BatchSource
from switchlm.errors import CheckpointError
from switchlm.files import replace_file, to_json
from switchlm.kernels.cpu.memory import keep_freed_memory
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.config import KernelsConfig, TrainingConfig
from switchlm.training.divergence import AT_THE_END, IN_A_ROW, FailedSteps, stop_diverged
from switchlm.training.evaluation import Evaluator, HeldOutLoss
from switchlm.training.kernel_choice import choose_switch
from switchlm.training.monitor import Averages, HostCopy, Line, open_monitor
from switchlm.training.optimizer import (
    build_optimizer,
    learning_rate,
    optimizer_state,
    set_learning_rate,
)
from switchlm.training.run_folder import RunFolder, truncate_metrics
from switchlm.training.step import (
    Objective,
    StepRecord,
    prepare_for_training,
    seed_step,
    summarise_routing,
    target_cross_entropy,
    training_step,
)

AUTOMATIC = KernelsConfig()


@dataclass
class Progress:
    """Progress of a run.

    step: optimisation steps done.
    seconds: of training, without evaluations and checkpoints.
    tokens: without padding.
    evaluated: the step of the last evaluation.
    stopped: whether the evaluator ended the run.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    evaluated: int = 0
    stopped: bool = False


def train(
    model: SwitchTransformer,
    loader: BatchSource,
    config: TrainingConfig,
    *,
    run: RunFolder | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh = ALONE,
    objective: Objective = target_cross_entropy,
    evaluator: Evaluator | None = None,
    kernels: KernelsConfig = AUTOMATIC,
) -> Iterator[Line]:
    """Train `model` in place on its device and yield every metrics line as it is written.

    On many processes each calls this with the same arguments, its model sharded over `mesh` and
    `loader` giving its share of every batch; all yield the same lines, and rank 0 writes them.

    A line of training (every `log_every` steps, and the last step) has step, tokens and seconds of
    training so far; loss (nats per target), balance_loss, z_loss (both weighted) and gradient_norm
    (before clipping) as means since the last line, None if every step was skipped; skipped, spikes
    and tokens_per_second since then; and learning_rate and dropped of the step itself. Sparse
    models add, of the step, layers (names), load (a list of shares per layer), gate and
    dropped_by_layer. A line of evaluation has step, seconds, and the metrics of the evaluator.

    The held-out loss gives evaluation_loss and evaluation_loss_by_source, nats per target, and
    evaluation_bits_per_byte, of the target text without sentinels. A single process adds, measured
    on the first held-out batch (up to 8,192 input tokens, without padding): attention_near, for
    each self-attention by name one number per head, the attention weight on keys at most 3
    positions away, mean over tokens. Sparse models add layers (names), and of each: gate, mean over
    kept assignments; dead_experts, the number of experts without a token; router_entropy, of a
    token's probabilities, mean over tokens, and load_entropy, of the experts' shares, both in nats,
    at most ln E; kept_expert, the share of up to 1,024 fixed tokens with the same first choice as
    at the evaluation before, None at the first one.

    run: where metrics.jsonl and checkpoints go; without it nothing is written.
    resume: continue from the newest valid checkpoint, or from the start if there is none.
    should_stop: checked after every step; the run ends at the same step on all processes.
    objective: what is minimised, and `loss` in the lines; held-out losses are always cross-entropy.
    evaluator: called every `config.evaluate_every` steps; None takes the loader's held-out loss.
    kernels: chosen before the first step, see `choose_switch`; written to RUN/kernels.json.

    The run ends after `config.steps`, after `config.seconds`, or when `evaluator` or `should_stop`
    ends it, with a last checkpoint and a last evaluation. Raises DivergedError if many steps in a
    row were skipped, or the last held-out loss is not finite (see divergence.py).
    """
    state = _Run(model, loader, config, run, should_stop, mesh, objective, evaluator, kernels)
    return state.lines(resume)


@dataclass
class _Run:
    """The arguments of `train`, and its state."""

    model: SwitchTransformer
    loader: BatchSource
    config: TrainingConfig
    folder: RunFolder | None
    should_stop: Callable[[], bool]
    mesh: Mesh
    objective: Objective
    evaluator: Evaluator | None
    kernels: KernelsConfig | None  # None once they are chosen

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        if config.evaluate_every is None:
            self.evaluator = None
        self.device = model.embedding.weight.device
        self.optimizer: Optimizer = build_optimizer(model, config)
        self.progress = Progress()
        self.saved = (0, 0)  # step of the newest checkpoint, and of its last evaluation
        self.averages = Averages(FailedSteps(model.config.vocabulary_size))
        self.logged = Progress()
        self.stop_requested = self.stop_agreed = False
        self.stop_requests: HostCopy | None = None
        self.layers = list(switch_layers(model))
        self.store: CheckpointStore | None = None
        if self.folder is not None:
            self.store = CheckpointStore(
                self.folder.checkpoints, keep=config.keep_checkpoints, group=self.mesh.storage
            )
        if self.device.type == "cpu":
            keep_freed_memory()
        prepare_for_training(model, config.precision, config.activation_checkpointing)
        if config.compile:
            model.compile()

    def lines(self, resume: bool) -> Iterator[Line]:
        config = self.config
        if self.evaluator is None and config.evaluate_every is not None:
            batches = self.loader.held_out(config.evaluate_batches)
            if batches:
                loader = self.loader
                self.evaluator = HeldOutLoss(batches, loader.sources, self.mesh, loader.tokenizer)
        if resume:
            self._resume()
        elif self.store is not None and self.store.steps():
            raise CheckpointError(
                f"There are already checkpoints of a run in {str(self.store.folder)!r}. Resume it, "
                "or give another folder."
            )
        with ExitStack() as opened:
            if self.store is not None:
                opened.enter_context(self.store)
                self.store.prepare(self._tensors())
            folder = self.folder if self.mesh.is_main else None
            resumed_at = self.progress.step if resume else None
            write = opened.enter_context(open_monitor(folder, config, resumed_at))
            stream = self.loader.iterate(self.progress.step * config.accumulate)
            opened.enter_context(closing(stream))
            while not self._done():
                record = self._step(stream)
                if self._due(config.log_every, at_end=True):
                    yield write(self._training_line(record))
                    self._check_failed_steps(IN_A_ROW)
                if self.progress.step == config.steps:
                    break
                if self.evaluator is not None and self._due(config.evaluate_every):
                    yield write(self._evaluation_line(self.evaluator))
                if self._due(config.checkpoint_every):
                    self._save(most_failed=0)
            interrupted = self.mesh.any_rank(self.should_stop())
            if not interrupted:
                self._check_failed_steps(min(AT_THE_END, max(self.progress.step // 2, 1)))
            self._save()  # before anything that takes time, or may fail
            if (
                self.evaluator is not None
                and (self.evaluator.when_stopped or not interrupted)
                and self.progress.evaluated != self.progress.step
            ):
                line = write(self._evaluation_line(self.evaluator))
                yield line
                if not interrupted:
                    self._check_evaluation(line)
                    self._save()

    def _step(self, batches: Iterator[tuple[int, Batch]]) -> StepRecord:
        """Take one step and update the progress."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        parts = [next(batches)[1] for _ in range(config.accumulate)]
        num_tokens = sum(batch.num_tokens for batch in parts)
        if self.kernels is not None:
            self._choose_kernels(self.kernels, parts[0])
            self.kernels = None
        seed_step(config.seed, progress.step, self.device, self.mesh.data_rank)
        set_learning_rate(self.optimizer, learning_rate(progress.step, config))
        record = training_step(
            self.model,
            self.optimizer,
            [batch.to(self.device) for batch in parts],
            gradient_clip=config.gradient_clip,
            mesh=self.mesh,
            objective=self.objective,
            num_tokens=num_tokens,
            stop=self.stop_requested,
        )
        self._read_stop_requests(record)
        progress.step += 1
        self.mesh.beat(progress.step)
        self.averages.add(record.metrics, record.tokens)
        if self._due(config.log_every, at_end=True):
            self._count_tokens()  # waits for the device, so that the step's time is complete
        progress.seconds += time.perf_counter() - started
        return record

    def _choose_kernels(self, kernels: KernelsConfig, batch: Batch) -> None:
        """Choose kernels for the size of the first batch, on every process."""
        num_tokens = batch.inputs_BS.numel()
        choice = choose_switch(self.model, self.config, num_tokens, kernels.switch, self.mesh)
        if choice is not None and self.folder is not None and self.mesh.is_main:
            replace_file(self.folder.kernels, to_json({"switch": vars(choice)}).encode())

    def _read_stop_requests(self, record: StepRecord) -> None:
        """Read the stop requests of the step before, which are on the host already.

        All processes read the same number after the same step, and so stop after the same one.
        """
        if self.stop_requests is not None:
            self.stop_agreed = self.stop_requests.item() > 0
        if self.mesh.is_distributed:
            self.stop_requests = HostCopy(record.stops)

    def _count_tokens(self) -> None:
        self.progress.tokens += self.averages.take_tokens()

    def _due(self, every: int | None, *, at_end: bool = False) -> bool:
        step = self.progress.step
        if at_end and step == self.config.steps:
            return True
        return every is not None and step % every == 0

    def _done(self) -> bool:
        config, progress = self.config, self.progress
        out_of_time = config.seconds is not None and progress.seconds >= config.seconds
        if progress.step >= config.steps or progress.stopped:
            return True
        self.stop_requested = out_of_time or self.should_stop()
        return self.stop_agreed if self.mesh.is_distributed else self.stop_requested

    def _training_line(self, record: StepRecord) -> Line:
        progress, logged = self.progress, self.logged
        averages = self.averages.line()
        line: Line = {
            "step": progress.step,
            **averages,
            "dropped": 0.0,
            "learning_rate": learning_rate(progress.step - 1, self.config),
            "tokens": progress.tokens,
            "tokens_per_second": (progress.tokens - logged.tokens)
            / max(progress.seconds - logged.seconds, 1e-9),
            "seconds": progress.seconds,
        }
        summary = summarise_routing(record.routing, self.mesh)
        if summary is not None:
            line |= {
                "dropped": float(summary.dropped_L.mean()),
                "layers": self.layers,
                "load": summary.load_LE.tolist(),
                "gate": summary.gate_L.tolist(),
                "dropped_by_layer": summary.dropped_L.tolist(),
            }
        self.logged = Progress(progress.step, progress.seconds, progress.tokens)
        return line

    def _evaluation_line(self, evaluator: Evaluator) -> Line:
        progress = self.progress
        result = evaluator.evaluate(self.model, progress.step)
        progress.evaluated, progress.stopped = progress.step, result.stop
        return {"step": progress.step, "seconds": progress.seconds, **result.metrics}

    def _check_failed_steps(self, most: int) -> None:
        """Raise DivergedError if the last `most` steps failed, or more."""
        self._count_tokens()
        failed = self.averages.failed
        if failed.in_a_row >= most:
            what = (
                f"loss or gradients of the last {failed.in_a_row} steps were not finite, or the "
                f"loss above {failed.worst:.0f}."
            )
            stop_diverged(what, self.progress.step, failed.in_a_row, self.store, self.config)

    def _check_evaluation(self, line: Line) -> None:
        """Raise DivergedError if the loss of the last evaluation is not finite."""
        if line.get("evaluation_loss", 0.0) is None:
            what = "the held-out loss is not finite."
            stop_diverged(what, self.progress.step, 0, self.store, self.config)

    def _tensors(self) -> dict[str, Any]:
        """Return trainable parameters, buffers and optimizer state, to save or load in place."""
        frozen = {name for name, part in self.model.named_parameters() if not part.requires_grad}
        state = self.model.state_dict()
        return {
            "model": {name: tensor for name, tensor in state.items() if name not in frozen},
            "optimizer": optimizer_state(self.model, self.optimizer),
        }

    def _save(self, most_failed: int = AT_THE_END - 1) -> None:
        """Save a checkpoint, unless there is one of this step and evaluation.

        most_failed: of the last steps; after more, the checkpoint might replace the last good one.
        """
        point = (self.progress.step, self.progress.evaluated)
        if self.store is None or self.saved == point:
            return
        self._count_tokens()
        if self.averages.failed.in_a_row > most_failed:
            return
        progress = {
            "done": vars(self.progress),
            "logged": vars(self.logged),
            "averages": self.averages.state(),
            "evaluator": {} if self.evaluator is None else self.evaluator.state(),
        }
        self.store.save(self.progress.step, {**self._tensors(), "progress": progress})
        self.saved = point

    def _resume(self) -> None:
        if self.store is None or self.folder is None:
            raise CheckpointError("A run can only be resumed from its folder, and none was given.")
        if self.store.steps():
            progress = self.store.load(None, self._tensors())["progress"]
            self.progress = Progress(**progress["done"])
            self.logged = Progress(**progress["logged"])
            self.averages.restore(progress["averages"])
            if self.evaluator is not None and progress.get("evaluator"):
                self.evaluator.restore(progress["evaluator"])
            self.saved = (self.progress.step, self.progress.evaluated)
            self.store.discard_after(self.progress.step)
        if self.mesh.is_main:
            truncate_metrics(self.folder.metrics, self.progress.step)
