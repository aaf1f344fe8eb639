"""Three optimiser steps against those of TRL's trainers; skipped where TRL is not installed."""

import pytest
import torch
import transformers
from conftest import chat, load_script, read_rows, start, text_pairs, write_rows

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# Names of our metrics, and TRL's for the same.
SAME = ["loss", "grad_norm"] + [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
SAME = dict(zip(SAME, SAME, strict=True))
OF_SFT = {"loss": "loss", "grad_norm": "grad_norm"}
OF_REWARD_MODEL = {"loss": "loss", "reward_model_grad_norm": "grad_norm"}
OF_REWARD_MODEL |= {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
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


def run_ours(name, path, folder, **flags):
    """The logged rows of a run, and its rows of data in the order in which they are trained on."""
    rows, script = text_pairs(8), load_script(name)
    for split in ("train", "test"):
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    flags = {"max_length": 512, "max_new_tokens": 1, "num_train_epochs": 3, "max_steps": 3} | flags
    flags |= {"lr_scheduler_type": "constant", "dataset_name": str(folder / "data"), "output_dir": str(folder / name)}
    args = script.Args(model_name_or_path=path, **flags)
    script.main(args)
    order = [rows[i] for batch in script.plan_batches(args, 8) for i in batch]
    return [row for row in read_rows(folder / name / "metrics.jsonl") if "train/loss" in row], order


def run_theirs(trainer_class, config, model, rows, **more):
    """The trainer after its three steps, and the logged rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    data = datasets.Dataset.from_list(rows)
    trainer = trainer_class(model, args=config, processing_class=tokenizer, train_dataset=data, **more)
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def load(path, head="CausalLM"):
    return getattr(transformers, f"AutoModelFor{head}").from_pretrained(path, dtype=torch.float32)


def assert_equal(ours, theirs, names=SAME):
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for name, their_name in names.items():
            assert a[f"train/{name}"] == pytest.approx(float(b[their_name]), rel=1e-4, abs=1e-6), (name, a, b)
    assert ours[0]["train/loss"] - ours[2]["train/loss"] > 0.01


def settings(batch_size, folder, **own):
    """Our flags, and TRL's options for the same."""
    theirs = {"per_device_train_batch_size": batch_size, "learning_rate": 1e-3, "output_dir": str(folder / "trl")}
    return {"batch_size": batch_size, "learning_rate": 1e-3}, COMMON | own | theirs


@pytest.mark.parametrize("batch_size", [8, 4])
def test_dpo(tiny_model, tmp_path, batch_size):
    path, (flags, options) = tiny_model(), settings(batch_size, tmp_path, beta=0.1, loss_type=["sigmoid"])
    ours, order = run_ours("dpo", path, tmp_path, beta=0.1, **flags)
    trainer, theirs = run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), load(path), order)
    pairs = load_script("dpo").encode_rows(start("dpo", path), order, "train")
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        their_ids = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == their_ids
    assert_equal(ours, theirs)


def test_ipo(tiny_model, tmp_path):
    """TRL's loss is on log-ratios divided by lengths."""
    path, (flags, options) = tiny_model(), settings(4, tmp_path, beta=0.4, loss_type=["ipo"])
    ours, order = run_ours("ipo", path, tmp_path, beta=0.4, length_normalize=True, **flags)
    assert_equal(ours, run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), load(path), order)[1])


def test_simpo(tiny_model, tmp_path):
    """simpo_gamma is gamma, not gamma / beta."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    own = {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.375, "cpo_alpha": 0.0}
    path, (flags, options) = tiny_model(), settings(4, tmp_path, **own)
    ours, order = run_ours("simpo", path, tmp_path, beta=2.5, gamma_beta_ratio=0.55, **flags)
    assert_equal(ours, run_theirs(CPOTrainer, CPOConfig(**options), load(path), order)[1])


def test_stage_2_of_pre_dpo(tiny_model, tmp_path):
    """The guide, trained by dpo.py, is the reference of DPO."""
    path, (flags, options) = tiny_model(), settings(4, tmp_path, beta=0.2, loss_type=["sigmoid"])
    run_ours("dpo", path, tmp_path, **flags)
    guide = str(tmp_path / "dpo" / "model")
    ours, order = run_ours("pre_dpo", path, tmp_path, beta=0.2, guide_model_name_or_path=guide, **flags)
    assert abs(ours[0]["train/loss"] - 0.6931) > 0.01
    _, theirs = run_theirs(trl.DPOTrainer, trl.DPOConfig(**options), load(path), order, ref_model=load(guide))
    assert_equal(ours, theirs)


def test_kto(tiny_model, tmp_path):
    """With one micro-batch a step, since TRL takes z0 from a micro-batch."""
    path, (flags, options) = tiny_model(), settings(8, tmp_path, beta=0.3, precompute_ref_log_probs=True)
    ours, _ = run_ours("kto", path, tmp_path, beta=0.3, **flags)
    script, rows = load_script("kto"), []
    for pair in text_pairs(8):  # in the order of make_examples
        for answer, label in ((pair["chosen"], True), (pair["rejected"], False)):
            rows.append({"prompt": pair["prompt"], "completion": answer, "label": label})
    args = script.Args(batch_size=8, num_train_epochs=3, max_steps=3)
    order = [rows[i] for batch in script.plan_batches(args, 16) for i in batch]
    theirs = run_theirs(trl.KTOTrainer, trl.KTOConfig(**options), load(path), order)[1]
    assert_equal(ours, theirs, OF_SFT)
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/z0"] == pytest.approx(float(b["kl"]), rel=1e-4, abs=1e-6)


def test_sft_of_rlhf(tiny_model, tmp_path):
    path, (flags, options) = tiny_model(), settings(4, tmp_path, adam_epsilon=1e-5, completion_only_loss=True)
    stage = {"sft_epochs": 3, "sft_learning_rate": flags.pop("learning_rate")}
    ours, order = run_ours("rlhf_ppo", path, tmp_path, **flags, **stage)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in order]
    assert_equal(ours[:3], run_theirs(trl.SFTTrainer, trl.SFTConfig(**options), load(path), rows)[1], OF_SFT)


def test_reward_model_of_rlhf(tiny_model, tmp_path):
    """Both start with the same new head."""
    path, (flags, options) = tiny_model(), settings(4, tmp_path, adam_epsilon=1e-5)
    stage = {"sft_epochs": 0, "reward_epochs": 3, "reward_learning_rate": flags.pop("learning_rate")}
    ours, order = run_ours("rlhf_ppo", path, tmp_path, **flags, **stage)
    initial = load_script("rlhf_ppo").add_head(start("rlhf_ppo", path, output_dir=str(tmp_path / "init")), path)
    model = load(initial, "SequenceClassification")
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(initial)
    theirs = run_theirs(trl.RewardTrainer, trl.RewardConfig(**options), model, order)[1]
    assert_equal(ours[:3], theirs, OF_REWARD_MODEL)


def online_trainer(trainer_class, config, path, reward=lambda **_: [0.0], **options):
    options |= {"per_device_train_batch_size": 4, "max_completion_length": 4, "use_cpu": True, "bf16": False}
    args = config(num_generations=2, gradient_checkpointing=False, report_to="none", **options)
    rows, tokenizer = [{"prompt": "a"}] * 4, transformers.AutoTokenizer.from_pretrained(path)
    data = datasets.Dataset.from_list(rows)
    trainer = trainer_class(load(path), reward, args=args, processing_class=tokenizer, train_dataset=data)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_grpo(tiny_model, tmp_path, loss_type):
    """Loss and gradient of the same answers, advantages, and log-probabilities of old policy and reference."""
    grpo, path, generator = load_script("grpo"), tiny_model(), torch.Generator().manual_seed(0)
    answers = [[20, 21, 0], [22, 23, 24, 25], [0], [26, 27, 0]]
    prompts, advantages = [[5, 6, 7], [5, 6, 7], [8], [8]], torch.randn(4, generator=generator)
    own = {"beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.3}
    run = start("grpo", path, max_new_tokens=4, loss_type=loss_type, **own)
    policy = grpo.load_model(run, path, trainable=True)
    logps = grpo.token_logps(policy, list(zip(prompts, answers, strict=True)))
    noise = 0.0 if loss_type == "rloo" else 0.3  # where ratios are not 1, TRL's are of whole answers in RLOO
    old = [logp.detach() + noise * torch.randn(len(logp), generator=generator) for logp in logps]
    ref = [logp.detach() + 0.3 * torch.randn(len(logp), generator=generator) for logp in logps]
    columns = zip(prompts, answers, advantages.tolist(), [1.0] * 4, old, ref, strict=True)
    losses, _ = grpo.loss_of_answers(run, policy, [grpo.Rollout(*row) for row in columns], mean_length=11 / 4)
    losses.mean().backward()

    if loss_type == "rloo":
        trainer = online_trainer(trl.RLOOTrainer, trl.RLOOConfig, path, output_dir=str(tmp_path), **own)
    else:  # by default TRL multiplies k3 by the ratio, which is not in Eq. 3
        own |= {"loss_type": loss_type, "use_bias_correction_kl": False, "output_dir": str(tmp_path)}
        trainer = online_trainer(trl.GRPOTrainer, trl.GRPOConfig, path, **own)

    def pad(rows, left=False):
        rows = [torch.as_tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")

    ones = [[1] * len(answer) for answer in answers]
    inputs = {"prompt_ids": pad(prompts, left=True), "prompt_mask": pad([[1] * len(p) for p in prompts], left=True)}
    inputs |= {"completion_ids": pad(answers), "completion_mask": pad(ones), "advantages": advantages}
    inputs |= {"old_per_token_logps": pad(old), "ref_per_token_logps": pad(ref), "num_items_in_batch": torch.tensor(11)}
    inputs["old_logps"] = torch.stack([logp.sum() for logp in old])
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    if loss_type != "rloo":  # rloo's value is by token here and by answer in TRL
        assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    for weight, expected in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-6)


REWARD = """
def reward(completions, answer, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    lengths = [float(len(prompt)) for prompt in kwargs["prompts"]]
    return [1.0 if right in content else length for content, right, length in zip(contents, answer, lengths)]
"""


def test_a_reward_written_for_trl(tiny_model, tmp_path):
    """It gets the same prompts, completions and columns from both."""
    grpo, file, path = load_script("grpo"), tmp_path / "reward.py", tiny_model()
    file.write_text(REWARD)
    namespace = {}
    exec(REWARD, namespace)
    trainer = online_trainer(trl.GRPOTrainer, trl.GRPOConfig, path, namespace["reward"], output_dir=str(tmp_path))
    rows = [{"prompt": chat("one"), "answer": "1"}, {"prompt": chat("two", "2?", "yes"), "answer": "3"}]
    texts = ["It is 1.", "It is 2."]
    completions = [chat("", text)[1:] for text in texts]
    theirs = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, [[20], [21]])
    run = start("grpo", path)
    ours = grpo.judge(run, str(file), grpo.encode_rows(run, rows, "train"), texts)
    assert ours == theirs[:, 0].tolist() == [1.0, 3.0]
