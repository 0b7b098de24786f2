"""Greedy outputs equal those of transformers on the same weights."""

import warnings

import pytest
import torch
import transformers

from switchlm.generation.decode import generate, pad_prompts
from switchlm.huggingface import load

MODELS = {
    "T5 v1.0": ("T5ForConditionalGeneration", {"num_experts": 0, "tied_head": True}, {}),
    "T5 v1.1": (
        "T5ForConditionalGeneration",
        {"num_experts": 0, "gated": True, "activation": "gelu"},
        {},
    ),
    "Switch": (
        "SwitchTransformersForConditionalGeneration",
        {},
        {"mode": "hf", "expert_capacity": 64},
    ),
    "Switch with the encoder's capacity binding": (
        "SwitchTransformersForConditionalGeneration",
        {},
        {"mode": "hf", "expert_capacity": 2},
    ),
}


@pytest.mark.parametrize(("kind", "changes", "router"), MODELS.values(), ids=MODELS.keys())
def test_greedy_tokens_are_those_of_transformers(build, prompts, tmp_path, kind, changes, router):
    model = build(seed=4, router=router, **changes)
    load.save(model, None, tmp_path / "model")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "model").eval()
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    ours = generate(model, inputs_BS, segments_BS, max_new_tokens=10, encoder_capacity=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = theirs.generate(
            input_ids=inputs_BS,
            attention_mask=(segments_BS != 0).long(),
            max_new_tokens=10,
            do_sample=False,
        )
    assert expected[:, 0].tolist() == [0] * len(prompts)
    assert torch.equal(ours.tokens_BT, expected[:, 1:])
    assert len(set(ours.tokens_BT.flatten().tolist())) > 5, "a test on dull outputs is none"
    binds = router.get("expert_capacity") == 2
    dropless = generate(model, inputs_BS, segments_BS, max_new_tokens=10)
    assert torch.equal(dropless.tokens_BT, ours.tokens_BT) != binds
