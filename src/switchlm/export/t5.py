"""A dense model as a plain T5, which transformers loads as `T5ForConditionalGeneration`."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, MissingExtraError
from switchlm.files import Report
from switchlm.huggingface import load
from switchlm.model.transformer import SwitchTransformer


def write_t5(
    model: SwitchTransformer, tokenizer: Tokenizer, folder: Path, *, report: Report | None = None
) -> None:
    """Save a dense model, its tokenizer and generation_config.json in T5's own layout.

    Raises CheckpointError for a sparse model, which T5 cannot be: its dense student can.
    """
    if model.config.num_experts:
        raise CheckpointError(
            f"A plain T5 is dense, and this model has {model.config.num_experts} experts a Switch "
            "layer. Distil it first, `switchlm distill --teacher MODEL --out RUN`, and export the "
            "student; or keep it sparse with --to onnx or --to torch."
        )
    load.save(model, tokenizer, folder, report=report)


def t5_tokens(folder: Path, text: str, max_new_tokens: int) -> list[int]:
    """Return the tokens that transformers generates from the folder by itself, greedily.

    Everything comes from the folder: the model by AutoModelForSeq2SeqLM, the input by its
    AutoTokenizer. The end token and what follows are left out.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError("transformers", "transformers", "Checking a T5 with transformers")
    import torch
    import transformers

    theirs: Any = transformers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        inputs = theirs.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        with torch.no_grad():
            row = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )[0].tolist()[1:]
    end_id = model.config.eos_token_id
    return row[: row.index(end_id)] if end_id in row else row
