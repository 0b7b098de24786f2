import pytest
import torch
from tests.transformers.models import assert_same, pair_of

from switchlm.errors import CheckpointError
from switchlm.transformers import convert_adapter

peft = pytest.importorskip("peft")


def adapter_of(theirs, folder, **options):
    """Save a LoRA adapter of transformers' class, with both matrices random."""
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_adapters_of_transformers_compute_the_same_here(
    folder, dense_folder, batch, tmp_path, kind
):
    ours, theirs = pair_of(folder if kind == "sparse" else dense_folder)
    before = ours(**batch[0], labels=batch[1]).logits
    torch.manual_seed(0)
    targets = ["q", "v"] if kind == "sparse" else ["q", "v", "wi_0", "wo"]
    adapted = adapter_of(theirs, tmp_path / "theirs", target_modules=targets)
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", ours.model.config)
    converted = peft.PeftModel.from_pretrained(ours, tmp_path / "ours")
    expected = adapted(**batch[0], labels=batch[1]).logits
    torch.testing.assert_close(
        converted(**batch[0], labels=batch[1]).logits, expected, rtol=1e-3, atol=1e-3
    )
    assert (before - expected).abs().max() > 0.1


def test_errors(folder, dense_folder, tmp_path):
    ours, theirs = pair_of(folder)
    config = ours.model.config
    with pytest.raises(CheckpointError, match="no adapter of PEFT in"):
        convert_adapter(tmp_path, tmp_path / "out", config)
    adapter_of(theirs, tmp_path / "experts", target_modules=["wi"])
    with pytest.raises(CheckpointError, match="but experts are stacked here: merge it"):
        convert_adapter(tmp_path / "experts", tmp_path / "out", config)
    _, theirs = pair_of(dense_folder)
    adapter_of(theirs, tmp_path / "head", target_modules=["q"], rank_pattern={"q": 2})
    with pytest.raises(CheckpointError, match="with rank_pattern cannot be converted"):
        convert_adapter(tmp_path / "head", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_prompt_tuning_is_that_of_transformers(folder, batch):
    results = []
    for model in pair_of(folder):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
        tuned = peft.get_peft_model(model, config).eval()
        loss = tuned(**batch[0], labels=batch[1]).loss
        loss.backward()
        (prompt,) = (one for one in tuned.parameters() if one.requires_grad)
        results.append((loss.detach(), prompt.grad, tuned.generate(**batch[0], max_new_tokens=6)))
    assert_same(*results)
