"""Three optimiser steps against those of TRL's trainers; skipped where TRL is not installed."""

import json

import pytest
import torch
import transformers
from conftest import MINIMAL, load_script, read_rows, text_pairs, write_rows

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
dpo = load_script("dpo")

METRICS = ["loss", "grad_norm", "logps/chosen", "logps/rejected"]
METRICS += [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
COMMON = {
    "max_length": 512,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
}


def run_ours(name, path, rows, folder, **flags):
    """The logged rows, and the rows of data in the order in which they were trained on."""
    for split in ("train", "test"):
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    script = load_script(name)
    settings = {"judge_name_or_path": None, "max_new_tokens": 1, "max_length": 512, "lr_scheduler_type": "constant"}
    settings |= {"num_train_epochs": 3, "max_steps": 3, "output_dir": str(folder / name)} | flags
    args = script.Args(model_name_or_path=path, dataset_name=str(folder / "data"), **settings)
    script.main(args)
    if name in MINIMAL:
        order = [rows[i] for batch in script.plan_batches(args, len(rows)) for i in batch]
    else:
        order = [row for batch in script.plan_batches(args, rows) for row in batch]
    return [row for row in read_rows(folder / name / "metrics.jsonl") if "train/loss" in row], order


def run_theirs(trainer_class, config, path, rows, reference=None):
    """The trainer after its three steps, and the logged rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    options = {"args": config, "processing_class": transformers.AutoTokenizer.from_pretrained(path)}
    if reference:
        options["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    trainer = trainer_class(model, train_dataset=datasets.Dataset.from_list(rows), **options)
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for name in METRICS:
            assert a[f"train/{name}"] == pytest.approx(float(b[name]), rel=1e-4, abs=1e-6), (name, json.dumps(b))
    assert ours[0]["train/loss"] - ours[2]["train/loss"] > 0.01


def settings(batch_size, folder, learning_rate=1e-3, **own):
    """Our flags, and TRL's options for the same."""
    ours = {"batch_size": batch_size, "learning_rate": learning_rate}
    return ours, COMMON | own | {
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "output_dir": str(folder / "trl"),
    }


@pytest.mark.parametrize("batch_size", [8, 4])
def test_dpo(tiny_model, tmp_path, batch_size):
    path, (flags, options) = tiny_model(), settings(batch_size, tmp_path, beta=0.1, loss_type=["sigmoid"])
    ours, order = run_ours("dpo", path, text_pairs(8), tmp_path, beta=0.1, **flags)
    trainer, theirs = run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), path, order)

    run = dpo.Run(dpo.Args(), tmp_path, trainer.processing_class, stop_ids=[0], saved_step=0)
    pairs = dpo.encode_rows(run, order, "rows")
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
        )
    assert_equal(ours, theirs)


def test_ipo(tiny_model, tmp_path):
    """Whose loss is on log-ratios divided by lengths."""
    path, (flags, options) = tiny_model(), settings(4, tmp_path, beta=0.4, loss_type=["ipo"])
    ours, order = run_ours("ipo", path, text_pairs(8), tmp_path, beta=0.4, length_normalize=True, **flags)
    assert_equal(ours, run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), path, order)[1])


def test_simpo(tiny_model, tmp_path):
    """simpo_gamma is gamma, not gamma / beta."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    own = {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.375, "cpo_alpha": 0.0}
    path, (flags, options) = tiny_model(), settings(4, tmp_path, **own)
    ours, order = run_ours("simpo", path, text_pairs(8), tmp_path, beta=2.5, gamma_beta_ratio=0.55, **flags)
    assert_equal(ours, run_theirs(CPOTrainer, CPOConfig(**options), path, order)[1])


def test_stage_2_of_pre_dpo(tiny_model, tmp_path):
    path, (flags, options) = tiny_model(), settings(4, tmp_path, beta=0.2, loss_type=["sigmoid"])
    ours, order = run_ours("pre_dpo", path, text_pairs(8), tmp_path, beta=0.2, **flags)
    theirs = run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), path, order, tmp_path / "pre_dpo" / "guide")[1]
    assert len(ours) == 6 and abs(ours[3]["train/loss"] - 0.6931) > 0.01
    assert_equal(ours[3:], theirs)


def assert_stage_equal(ours, theirs, accuracy=None):
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert a[f"train/{name}"] == pytest.approx(float(b[name]), rel=1e-4, abs=1e-6), (name, json.dumps(b))
        if accuracy:
            assert a["method/reward_accuracy"] == pytest.approx(float(b[accuracy]))
    assert ours[0]["train/loss"] - ours[2]["train/loss"] > 0.01


def test_sft_of_rlhf(tiny_model, tmp_path):
    path, (flags, options) = tiny_model(), settings(4, tmp_path, adam_epsilon=1e-5, completion_only_loss=True)
    stage = {"sft_epochs": 3, "sft_learning_rate": flags.pop("learning_rate")}
    ours, order = run_ours("rlhf_ppo", path, text_pairs(8), tmp_path, **flags, **stage)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in order]
    assert_stage_equal(ours[:3], run_theirs(trl.SFTTrainer, trl.SFTConfig(**options), path, rows)[1])


def test_reward_model_of_rlhf(tiny_model, tmp_path):
    rlhf = load_script("rlhf_ppo")
    path, (flags, options) = tiny_model(), settings(4, tmp_path, adam_epsilon=1e-5)
    stage = {"sft_epochs": 0, "reward_epochs": 3, "reward_learning_rate": flags.pop("learning_rate")}
    ours, order = run_ours("rlhf_ppo", path, text_pairs(8), tmp_path, **flags, **stage)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    run = rlhf.Run(rlhf.Args(), tmp_path, torch.device("cpu"), torch.float32, 2048, tokenizer, [0])
    trainer = trl.RewardTrainer(
        rlhf.load_scorer(run, path, torch.float32),  # with the same new head
        args=trl.RewardConfig(**options),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(order),
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert_stage_equal(ours[:3], theirs, accuracy="accuracy")
