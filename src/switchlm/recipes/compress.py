"""Prune, merge and quantise a model, and measure the loss after each step on the user's text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from switchlm.compression.calibrate import LEAST_ROWS, calibrate
from switchlm.compression.prune import Measure, check_number, importance, merge, prune
from switchlm.compression.quantise import Rounding, quantise_all, round_to_nearest
from switchlm.compression.rescale import find_rescaling, rescale
from switchlm.config import check_choices
from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.files import Report
from switchlm.huggingface.load import load_config, load_tokenizer, open_unquantised, save
from switchlm.huggingface.match import match
from switchlm.huggingface.quantised import (
    Quantisation,
    save_quantised,
    weights_of_model,
)
from switchlm.huggingface.save import check_replaceable
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.config import load_with_tokenizer

LARGE_LOSS = 0.1  # nats: what quantising costs is said in words from here on


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """The steps, in this order.

    keep_experts: prune to this number of experts per layer.
    by: the importance by which experts are kept, see prune.py.
    merge_experts: merge to this number of experts per layer.
    quantisation: None for none.
    calibrate: fit the codes to the text (GPTQ).
    """

    keep_experts: int | None = None
    by: Measure = "load"
    merge_experts: int | None = None
    quantisation: Quantisation | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "plan")

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError for a plan without steps, or with steps that do not fit the model."""
        if self.calibrate and self.quantisation is None:
            raise ConfigError("--calibrate fits codes to a text: say how many --bits they have.")
        if (self.keep_experts, self.merge_experts, self.quantisation) == (None, None, None):
            raise ConfigError(
                "There is nothing to do: give --bits, --keep-experts or --merge-experts."
            )
        most = config.num_experts
        if self.keep_experts is not None:
            check_number(config, self.keep_experts, most, "--keep-experts")
            most = self.keep_experts
        if self.merge_experts is not None:
            check_number(config, self.merge_experts, most, "--merge-experts")

    @property
    def needs_text(self) -> bool:
        """Whether a step reads text."""
        return self.calibrate or self.keep_experts is not None or self.merge_experts is not None


@dataclass(frozen=True)
class CompressionData:
    """Batches of text or tasks.

    calibration: that steps are fitted to.
    held_out: that the loss is measured on.
    sources: names that `Batch.source_B` indexes.
    """

    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    sources: tuple[str, ...]


@dataclass
class CompressionResult:
    """The steps and their results.

    steps: loss, and bytes of the weights, before and after every step.
    kept: experts kept in each Switch layer.
    merged: experts merged into each one, in each Switch layer.
    too_few: experts that got too few rows of the text to be calibrated.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, list[int]] = field(default_factory=dict)
    merged: dict[str, list[list[int]]] = field(default_factory=dict)
    too_few: list[str] = field(default_factory=list)


def quantise_folder(
    name: str, out: Path, quantisation: Quantisation, *, report: Report
) -> CompressionResult:
    """Round the weights of a saved model to the nearest codes; return its size before and after.

    One matrix is in memory at a time, so that models larger than memory can be quantised.
    """
    config, metadata, family, weights = open_unquantised(name, report=report)
    tokenizer = load_tokenizer(name, report=report)
    matched = match(config, family, weights, report)
    rescaling = find_rescaling(config, lambda: matched.read(weights))
    _report_rescaled(rescaling.num_features, report)
    source = rescaling.source(matched.read(weights))
    quantise = Rounding(quantisation)
    save_quantised(source, config, tokenizer, out, quantisation, quantise, metadata=metadata)
    files = {description.file for description in weights.tensors.values()}
    before = sum(path.stat().st_size for path in files)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    report(
        f"Rounding changed the weights by {quantise.error:.2%} (root mean square), most "
        f"{quantise.worst[1]} by {quantise.worst[0]:.2%}. What that does to the loss was not "
        "measured: give text with --data or --task."
    )
    rounded = {"step": _rounded(quantisation), "bytes": after, "weight_error": quantise.error}
    return CompressionResult([{"step": "as it was", "bytes": before}, rounded])


def compress(
    name: str,
    out: Path,
    plan: CompressionPlan,
    read: Callable[[Tokenizer], CompressionData],
    *,
    report: Report,
) -> CompressionResult:
    """Compress a saved model and write it to `out`; return the loss and size after every step.

    read: returns the text, tokenized.
    report: called with a line about rescaled features, about experts that were not calibrated, and
        about a large loss.

    Raises ConfigError for a plan that does not fit the model, CheckpointError for a model that is
    quantised already, or without a tokenizer.
    """
    check_replaceable(out)
    plan.check(load_config(name, report=report, to_train=True))
    model, tokenizer = load_with_tokenizer(name, "model", report, dtype=torch.float32)
    data = read(tokenizer)
    done = CompressionResult()

    def measure(step: str, changed: SwitchTransformer, num_bytes: int) -> None:
        loss = held_out_loss(changed, data.held_out, data.sources)["loss"]
        done.steps.append({"step": step, "loss": loss, "bytes": num_bytes})

    measure("as it was", model, _float_bytes(model))
    if plan.keep_experts is not None:
        before = model.config.num_experts
        scores = importance(model, data.calibration, plan.by)
        model, done.kept = prune(model, scores, plan.keep_experts)
        step = f"{plan.keep_experts} of {before} experts kept, by {plan.by}"
        measure(step, model, _float_bytes(model))
    if plan.merge_experts is not None:
        before = model.config.num_experts
        scores = importance(model, data.calibration, "load")
        model, done.merged = merge(model, scores, plan.merge_experts)
        step = f"{before} experts merged to {plan.merge_experts}"
        measure(step, model, _float_bytes(model))
    if plan.quantisation is None:
        save(model, tokenizer, out, report=report)
        return done
    float_loss = done.steps[-1]["loss"]
    _report_rescaled(rescale(model), report)
    codes = quantise_all(model, plan.quantisation, round_to_nearest(plan.quantisation))
    measure(_rounded(plan.quantisation), codes.model(model), codes.num_bytes(model))
    if plan.calibrate:
        found = calibrate(model, data.calibration, plan.quantisation)
        codes, done.too_few = found.codes, found.too_few
        if found.too_few:
            report(
                f"{len(found.too_few)} experts got fewer than {LEAST_ROWS} rows of the text and "
                f"were rounded to nearest, such as {found.too_few[0]}. More --batches may reach "
                "them."
            )
        step = f"{plan.quantisation.bits} bits, calibrated"
        measure(step, codes.model(model), codes.num_bytes(model))
    lost = done.steps[-1]["loss"] - float_loss
    if not lost <= LARGE_LOSS:
        report(
            f"Quantising raised the loss by {lost:.2f} nats, more than it usually does. Try "
            "--bits 8, --calibrate, a smaller --group-size, or --what experts."
        )
    save_quantised(
        weights_of_model(model),
        model.config,
        tokenizer,
        out,
        codes.quantisation,
        lambda entry, _weight: codes.get(entry),
        metadata=model.metadata,
    )
    return done


def _report_rescaled(number: int, report: Report) -> None:
    if number:
        report(
            f"{number:,} features were out of proportion and were rescaled, which changes nothing "
            "but what rounding loses (docs/guides/compress.md)."
        )


def _rounded(quantisation: Quantisation) -> str:
    return f"{quantisation.bits} bits, rounded to nearest"


def _float_bytes(model: SwitchTransformer) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
