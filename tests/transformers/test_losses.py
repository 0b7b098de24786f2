import pytest
import torch
import transformers

from switchlm.transformers import SwitchTransformersForConditionalGeneration


@pytest.fixture
def parts(batch):
    """Return batches of a long and a short row, and both as one."""
    inputs, _ = batch
    labels = torch.full((2, 20), -100)
    labels[0, :2] = torch.tensor([5, 1])
    labels[1] = torch.arange(20, 40)
    ids = inputs["input_ids"][:2]
    rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in (0, 1)]
    return rows, {"input_ids": ids, "labels": labels}


def test_losses_of_accumulated_batches_add_up_to_that_of_all_labels(pair, parts):
    ours, _ = pair
    rows, both = parts
    for items in (22, torch.tensor(22)):
        losses = [ours(**row, num_items_in_batch=items).loss for row in rows]
        torch.testing.assert_close(sum(losses), ours(**both).loss)
    alone = ours(**rows[0], output_router_logits=True)
    added = ours(**rows[0]).loss
    shared = ours(**rows[0], output_router_logits=True, num_items_in_batch=22).loss
    torch.testing.assert_close(shared * 11, alone.loss)
    assert alone.loss > added


def test_without_labels_that_count_the_loss_is_zero(pair, batch):
    ours, _ = pair
    ours.zero_grad()
    labels = torch.full_like(batch[1], -100)
    for options in ({}, {"num_items_in_batch": 0}, {"output_router_logits": True}):
        loss = ours(**batch[0], labels=labels, **options).loss
        assert loss == 0
        loss.backward()
        assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)


@pytest.mark.slow
def test_trainer_that_accumulates_updates_as_with_the_whole_batch(folder, parts, tmp_path):
    pytest.importorskip("accelerate")
    _, both = parts
    data = [{name: value[i] for name, value in both.items()} for i in (0, 1)]
    weights = []
    for size in (1, 2):
        ours = SwitchTransformersForConditionalGeneration.from_pretrained(folder)
        ours.config.output_router_logits = False
        options = transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        transformers.Seq2SeqTrainer(model=ours, args=options, train_dataset=data).train()
        weights.append(ours.model.embedding.weight.detach())
    start = SwitchTransformersForConditionalGeneration.from_pretrained(folder)
    assert (weights[0] - start.model.embedding.weight).abs().max() > 1e-3
    torch.testing.assert_close(*weights)
