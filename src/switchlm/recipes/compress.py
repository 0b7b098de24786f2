"""Make a model smaller, and measure on the user's text what that costs."""

from pathlib import Path

from switchlm.checkpoint.config_fields import Report
from switchlm.checkpoint.huggingface import load_tokenizer, open_floats
from switchlm.checkpoint.quantised import Quantisation
from switchlm.checkpoint.quantised_saving import save_quantised, weights_of_files
from switchlm.compression.quantise import round_to_nearest


def quantise_folder(
    name: str, out: Path, quantisation: Quantisation, *, report: Report
) -> dict[str, int]:
    """Round the weights of a saved model to the nearest codes; return its size before and after.

    One matrix is in memory at a time, so that models larger than memory can be quantised.
    """
    config, family, weights = open_floats(name, report=report)
    tokenizer = load_tokenizer(name, report=report)
    source = weights_of_files(config, family, weights)
    save_quantised(source, config, tokenizer, out, quantisation, round_to_nearest(quantisation))
    files = {description.file for description in weights.tensors.values()}
    return {
        "bytes_before": sum(path.stat().st_size for path in files),
        "bytes_after": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
