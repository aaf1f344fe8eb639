"""Three optimiser steps of DPO against those of TRL's DPOTrainer; skipped where TRL is not installed."""

import json

import pytest
import torch
import transformers
from conftest import load_script, read_rows, text_pairs, write_rows

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
dpo = load_script("dpo")

SAME = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate"}
for metric in (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
):
    SAME[f"train/{metric}"] = metric


def run_ours(path, rows, folder, **flags):
    """The logged rows, and the rows of data in the order in which they were trained on."""
    for split in ("train", "test"):
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    args = dpo.Args(
        model_name_or_path=path,
        dataset_name=str(folder / "data"),
        judge_name_or_path=None,
        output_dir=str(folder / "run"),
        lr_scheduler_type="constant",
        num_train_epochs=3,
        max_steps=3,
        max_new_tokens=1,
        max_length=512,
        **flags,
    )
    dpo.main(args)
    order = [row for batch in dpo.plan_batches(args, rows) for row in batch]
    return [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["step"] > 0], order


def run_theirs(path, rows, folder, batch_size, learning_rate, beta):
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch_size,
        max_length=512,
        beta=beta,
        loss_type=["sigmoid"],
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("batch_size", [8, 4])
def test_three_steps_equal_those_of_trl(tiny_model, tmp_path, batch_size):
    path, settings = tiny_model(), {"batch_size": batch_size, "learning_rate": 1e-3, "beta": 0.1}
    ours, order = run_ours(path, text_pairs(8), tmp_path, **settings)
    trainer, theirs = run_theirs(path, order, tmp_path, **settings)

    run = dpo.Run(dpo.Args(), tmp_path, torch.device("cpu"), torch.float32, 2048, trainer.processing_class, [0])
    pairs = dpo.encode_rows(run, order, "rows")
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
        )

    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for name, their_name in SAME.items():
            assert a[name] == pytest.approx(float(b[their_name]), rel=1e-4, abs=1e-6), (name, json.dumps(b))
    assert ours[0]["train/loss"] - ours[2]["train/loss"] > 0.01
