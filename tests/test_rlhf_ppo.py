"""RLHF: PPO's losses, scalar heads, rollouts, one step of each stage, and how the stages follow."""

import copy
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from conftest import TOY, load_plain, load_script, naive_logps, read_rows, start, text_pairs, weights_of, write_rows

rlhf = load_script("rlhf_ppo")

# Prompts and answers; token 0 ends an answer, and the last one does not end.
ROWS = [([5, 6, 7, 8], [20, 21, 0]), ([9], [22, 23, 24, 25, 26, 0]), ([10, 11, 12], [0]), ([13, 14], [27, 28, 29, 30])]
PROMPTS, ANSWERS = map(list, zip(*ROWS, strict=True))
PAIRS = [rlhf.Pair(i, "", {}, prompt, answer, [1, 0], 1.0 if i % 2 else 0.3) for i, (prompt, answer) in enumerate(ROWS)]
FLAGS = {"kl_coef": 0.3, "missing_eos_score": -3.0, "gamma": 0.9, "seed": 5, "ppo_epochs": 3}
FLAGS |= {"clip_range": 0.3, "value_clip_range": 0.1, "value_coef": 0.4, "max_steps": 1, "max_grad_norm": 1e9}
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
SCORER = {"head": "SequenceClassification", "num_labels": 1}
TEMPLATE = (TOY / "policy/chat_template.jinja").read_text()
micro_batches = pytest.mark.parametrize("run", [1, 30, 10_000], indirect=True)  # of one row, of some and of all


@pytest.fixture
def run(tiny_model, tmp_path, request):
    tokens = getattr(request, "param", 30)
    return start("rlhf_ppo", tiny_model(), output_dir=str(tmp_path), micro_batch_tokens=tokens, **FLAGS)


@pytest.fixture
def models(run, tiny_model):
    """As PPO holds them, each with weights of its own, but without gradients."""
    policy, reference = [rlhf.load_model(run, tiny_model(family)) for family in ("llama", "llama-untied")]
    value_model, reward_model = [rlhf.load_scorer(run, tiny_model(family, **SCORER)) for family in ("llama", "qwen3")]
    return {"policy": policy, "reference": reference, "value_model": value_model, "reward_model": reward_model}


def naive_scores(model, prompt, answer):
    """The scores before each token of the answer, and after the last one."""
    return torch.stack([model(torch.tensor([prompt + answer[:t]])).logits[0, 0] for t in range(len(answer) + 1)])


def naive_advantages(rewards, values, gamma, gae_lambda):
    """By the definition, of one answer: sums of discounted temporal differences."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(rewards))]


def test_losses_are_clipped():
    """The policy's on the harmful side only, of a good and a bad token; values of 0 may go to -0.3 and to 0.3."""
    zeros, ratios, advantages = torch.zeros(2, 3), torch.tensor([[0.5, 1.1, 1.5]] * 2), torch.tensor([[2.0], [-2.0]])
    values, returns = torch.tensor([[0.1, 0.3, 0.6], [1.0, 2.0, -1.0]]), zeros + 0.5
    found = rlhf.compute_loss(ratios.log(), values, zeros, zeros, advantages, returns, 0.2, 0.3)
    expected = torch.tensor([[-2 * 0.5, -2 * 1.1, -2 * 1.2], [2 * 0.8, 2 * 1.1, 2 * 1.5]])
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], torch.tensor([[0.4, 0.2, 0.2], [0.5, 1.5, 1.5]]) ** 2 / 2)
    assert found[2]["clip_fraction"].tolist() == [[1, 0, 1]] * 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_scores_are_those_of_the_model_itself(family, run, tiny_model):
    """Before each token of an answer, the model's score of the row up to there, by itself."""
    path = tiny_model(family, **SCORER)
    model, alone = rlhf.load_scorer(run, path), load_plain(path, SCORER["head"])
    values, rewards = rlhf.token_scores(model, ROWS), rlhf.rewards_of(model, ROWS)
    for row, line, reward in zip(ROWS, values, rewards, strict=True):
        expected = naive_scores(alone, *row)
        torch.testing.assert_close(line, expected[:-1], **CLOSE)
        torch.testing.assert_close(reward, expected[-1], **CLOSE)


def test_head_of_a_new_reward_model(tiny_model, tmp_path):
    """N(0, 1 / sqrt(d + 1)) by the seed; the token that transformers takes for padding ends no answer."""
    path, heads = tiny_model(hidden_size=512), []
    for seed in (1, 1, 2):
        run = start("rlhf_ppo", path, seed=seed, output_dir=str(tmp_path))
        folder = rlhf.add_head(run, path)
        assert transformers.AutoConfig.from_pretrained(folder).pad_token_id not in [None, *run.stop_ids]
        heads.append(weights_of(folder)["score.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 512) and heads[0].std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)


FORMS = {"text": (None, False), "text with BOS": (None, True), "chat": ("<|end|>", False)}
FORMS |= {"line break": ("<|end|>\\n", False), "no stop token": ("", False)}


@torch.no_grad()
@pytest.mark.parametrize("form, bos", FORMS.values(), ids=FORMS)
def test_saved_reward_model_judges_as_it_was_trained(form, bos, tiny_model, tmp_path):
    """As any script's judge, it gives the score of the token that ends the answer, whatever the template ends with."""
    policy = shutil.copytree(tiny_model(), tmp_path / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", form or "<|end|>")
    if bos:
        tokenizer.bos_token, number = "<|system|>", tokenizer.convert_tokens_to_ids("<|system|>")
        special = {"single": "<|system|> $A", "special_tokens": [("<|system|>", number)]}
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**special)
    tokenizer.save_pretrained(policy)
    run = start("rlhf_ppo", policy, output_dir=str(tmp_path))
    rows = [row | {"prompt": "So it ends.<|end|> " + row["prompt"]} for row in text_pairs(4)]
    for row in rows if form is not None else []:
        for part in ("prompt", "chosen", "rejected"):
            row[part] = [{"role": "user" if part == "prompt" else "assistant", "content": row[part]}]
    model = rlhf.load_scorer(run, rlhf.add_head(run, str(policy)))
    kind, tokenizer = transformers.AutoModelForSequenceClassification, rlhf.judge_tokenizer(run, rows[0]["prompt"])
    folder = rlhf.save_stage(run, model, kind, str(policy), tokenizer, "reward_model")
    for pair in rlhf.encode_rows(run, rows, "train"):
        text = run.tokenizer.decode(pair.chosen_ids, skip_special_tokens=True)
        expected = naive_scores(model, pair.prompt_ids, pair.chosen_ids)[-1].item()
        (score,) = load_script("dpo").judge(run, folder, [pair], [text])
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def asked(monkeypatch):
    """Models answer as in ROWS; returns the list of what they are asked."""
    calls = []
    monkeypatch.setattr(rlhf, "generate", lambda run, *rest, **more: calls.append([*rest, *more.values()]) or ANSWERS)
    return calls


@micro_batches
@torch.no_grad()
def test_rollout(run, models, asked):
    """Row by row, in plain loops; the shift is 0.25."""
    rollouts, metrics = rlhf.roll_out(run, models, 0.25, PAIRS, seed=7)
    assert asked == [[models["policy"], PROMPTS, 7, 1.0]]
    kls, scores, all_advantages = [], [], []
    for rollout, row in zip(rollouts, ROWS, strict=True):
        logps, values = naive_logps(models["policy"], *row), naive_scores(models["value_model"], *row)[:-1] - 0.25
        kls.append(logps - naive_logps(models["reference"], *row))
        scores.append(naive_scores(models["reward_model"], *row)[-1].item() - 0.25 if 0 in row[1] else -3.0)
        rewards = [-0.3 * kl for kl in kls[-1].tolist()]
        rewards[-1] += scores[-1]
        all_advantages.append(torch.tensor(naive_advantages(rewards, values.tolist(), 0.9, 0.95)))
        assert (rollout.prompt_ids, rollout.answer_ids) == row
        torch.testing.assert_close(rollout.logps, logps, **CLOSE)
        torch.testing.assert_close(rollout.values, values, **CLOSE)
        torch.testing.assert_close(rollout.returns, all_advantages[-1] + values, **CLOSE)
    flat = torch.cat(all_advantages)
    whitened = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(torch.cat([rollout.advantages for rollout in rollouts]), whitened, **CLOSE)
    means = {"kl": sum(kl.sum().item() for kl in kls) / 4, "score": sum(scores) / 4, "eos_rate": 3 / 4}
    assert {name: metrics[f"train/{name}"] for name in means} == pytest.approx(means, abs=1e-4)


@torch.no_grad()
def test_shift_brings_the_reference_s_own_answers_to_0(run, models, asked):
    """Only of answers that end: the last row's does not."""
    shift = rlhf.find_shift(run, models["reward_model"], models["reference"], PAIRS)
    assert asked == [[models["reference"], PROMPTS, run.args.seed, 1.0]]
    rewards = [naive_scores(models["reward_model"], *row)[-1].item() for row in ROWS[:3]]
    assert sum(rewards) / 3 - shift == pytest.approx(0, abs=1e-5)


@pytest.fixture
def first_step(monkeypatch):
    """Stages end after their first step, without an update: its models, with gradients, and the losses of updates."""
    found = {"losses": []}

    def means_of(kind, parts, count):
        if kind == "train":
            found["losses"].append(sum(part["loss"].sum().item() for part in parts) / count)
        return {}

    monkeypatch.setattr(rlhf, "update", lambda run, models, *rest: found.update(models) or {})
    monkeypatch.setattr(rlhf, "evaluate", lambda *args, **flags: {})
    monkeypatch.setattr(rlhf, "means_of", means_of)
    monkeypatch.setattr(rlhf.Run, "log", lambda *args: None)
    return found


def assert_step(found, losses, updates=1, **models):
    """Each update has the loss and gradients of the mean of naive losses of plain models."""
    loss = torch.stack(losses).mean()
    (updates * loss).backward()
    assert found["losses"] == pytest.approx([loss.item()] * updates, rel=1e-4)
    for name, model in models.items():
        for weight, expected in zip(found[name].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, expected.grad, rtol=2e-3, atol=1e-4)


@micro_batches
def test_step_of_sft(run, tiny_model, first_step):
    """Cross-entropy, the mean over all tokens of the chosen answers."""
    rlhf.train_sft(run, PAIRS, PAIRS)
    policy = load_plain(tiny_model())
    assert_step(first_step, [-logp for row in ROWS for logp in naive_logps(policy, *row)], policy=policy)


@micro_batches
def test_step_of_the_reward_model(run, tiny_model, first_step):
    """From a new head; every other pair is preferred with probability 0.3."""
    rlhf.train_reward_model(run, tiny_model(), PAIRS, PAIRS, 0)
    model, losses = load_plain(run.folder / "reward_model_init", SCORER["head"]), []
    for pair in PAIRS:
        chosen, rejected = [naive_scores(model, pair.prompt_ids, x)[-1] for x in (pair.chosen_ids, pair.rejected_ids)]
        likely, unlikely = (1 + (rejected - chosen).exp()).log(), (1 + (chosen - rejected).exp()).log()
        losses.append(pair.preference_prob * likely + (1 - pair.preference_prob) * unlikely)
    assert_step(first_step, losses, reward_model=model)


@micro_batches
def test_step_of_ppo(run, tiny_model, first_step, monkeypatch):
    """The mean over all tokens of the answers; the shift, 0.25, is taken from the values."""
    policy, value_model = load_plain(tiny_model()), load_plain(tiny_model(**SCORER), SCORER["head"])
    generator, rollouts, losses = torch.Generator().manual_seed(0), [], []
    for row in ROWS:
        logps, values = naive_logps(policy, *row), naive_scores(value_model, *row)[:-1] - 0.25
        noise, value_noise, advantages, returns = torch.randn(4, len(row[1]), generator=generator)
        old_logps, old_values = (logps + 0.3 * noise).detach(), (values + 0.3 * value_noise).detach()
        rollouts.append(rlhf.Rollout(*row, old_logps, old_values, advantages, returns))
        for t, advantage in enumerate(advantages):
            ratio, near = (logps[t] - old_logps[t]).exp(), values[t].clamp(old_values[t] - 0.1, old_values[t] + 0.1)
            value_loss = torch.max((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2) / 2
            losses.append(torch.max(-advantage * ratio, -advantage * ratio.clamp(0.7, 1.3)) + 0.4 * value_loss)
    metrics = {"train/response_length": len(losses) / len(ROWS)}
    monkeypatch.setattr(rlhf, "find_shift", lambda *args: 0.25)
    monkeypatch.setattr(rlhf, "roll_out", lambda *args: (rollouts, metrics))
    rlhf.train_ppo(run, tiny_model(), tiny_model(**SCORER), PAIRS, PAIRS, 0)
    assert_step(first_step, losses, updates=3, policy=policy, value_model=value_model)


def metrics_of(model, folder, **changes):
    """Metrics of a run with one step of SFT, one of the reward model and two of PPO."""
    data = write_rows(folder / "data.jsonl", text_pairs(8))
    flags = {"model_name_or_path": model, "dataset_name": data, "dataset_test_split": "train", "num_eval_prompts": 4}
    flags |= {"output_dir": str(folder / "run"), "rollouts_per_step": 4, "max_new_tokens": 6, "ppo_epochs": 1}
    flags |= dict.fromkeys(["learning_rate", "sft_learning_rate", "reward_learning_rate"], 1e-3)
    rlhf.main(rlhf.Args(**flags | changes))
    return read_rows(folder / "run" / "metrics.jsonl")


def test_stages_start_from_each_other_s_results(tiny_model, monkeypatch, tmp_path):
    seen, roll_out = [], rlhf.roll_out

    def watched(run, models, *rest):
        seen.append({name: copy.deepcopy(model).state_dict() for name, model in models.items()})
        return roll_out(run, models, *rest)

    def same(these, those):  # all weights, or none
        (equal,) = {torch.equal(these[name], those[name]) for name in these if name in those}
        return equal

    monkeypatch.setattr(rlhf, "roll_out", watched)
    rows = metrics_of(tiny_model(), tmp_path)
    sft, head, reward = [weights_of(tmp_path / "run" / name) for name in ("sft", "reward_model_init", "reward_model")]
    assert not same(weights_of(tiny_model()), sft) and same(sft, head) and not same(head, reward)
    for models, changed in zip(seen, (False, True), strict=True):
        assert same(sft, models["reference"]) and same(sft, models["policy"]) is not changed
        assert same(reward, models["reward_model"]) and same(reward, models["value_model"]) is not changed
    assert not same(weights_of(tmp_path / "run/model"), models["policy"])
    assert ["eval/kl" in row for row in rows] == [True, True, False, False, True]


CHANGES = [{}, {"dtype": "bfloat16"}, {"lora_rank": 2}, {"dtype": "bfloat16", "lora_rank": 2}]
CHANGES += [{"sft_epochs": 0, "reward_name_or_path": str(TOY / "judge")}]


@pytest.mark.parametrize("changes", CHANGES, ids=["float32", "bfloat16", "LoRA", "LoRA in bfloat16", "PPO only"])
def test_first_answers_have_no_kl_and_a_ratio_of_exactly_1(changes, tiny_model, tmp_path):
    first, second = metrics_of(tiny_model(), tmp_path, micro_batch_tokens=100, **changes)[-2:]
    assert first["train/kl"] == 0 and second["train/kl"] != 0
    assert first["train/ratio_error"] == second["train/ratio_error"] == 0  # of the only update of each step


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_values_begin_at_0_with_a_reward_function(lora_rank, tiny_model, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **_): return [len(c) for c in completions]")
    changes = {"reward_name_or_path": str(tmp_path / "reward.py"), "sft_epochs": 0, "lora_rank": lora_rank}
    first, second = metrics_of(tiny_model(), tmp_path, **changes)[-2:]
    assert first["train/value"] == 0 != second["train/value"]


@pytest.mark.slow
def test_ppo_finds_a_reward(tmp_path):
    """A reward of 0.01 for each letter less: answers of 30 letters become shorter than 20 in 16 steps."""
    (tmp_path / "reward.py").write_text("def reward(completions, **_): return [-len(c) / 100 for c in completions]")
    changes = {"reward_name_or_path": str(tmp_path / "reward.py"), "sft_epochs": 0, "learning_rate": 3e-4}
    changes |= {"dataset_name": write_rows(tmp_path / "pairs.jsonl", text_pairs(16)), "num_train_epochs": 16}
    changes |= {"rollouts_per_step": 16, "ppo_epochs": 2, "max_new_tokens": 64}
    scores = [row["train/score"] for row in metrics_of(str(TOY / "policy"), tmp_path, **changes)[1:]]
    assert sum(scores[:4]) / 4 < -0.3 and sum(scores[8:]) / 8 > -0.2


def test_each_step_has_its_own_luck(tiny_model, tmp_path):
    write_rows(tmp_path / "same.jsonl", [text_pairs(1)[0] | {"chosen": f"It was great {i}."} for i in range(24)])
    changes = {"dataset_name": str(tmp_path / "same.jsonl"), "sft_epochs": 0, "learning_rate": 0.0}
    first, second = metrics_of(tiny_model(), tmp_path, reward_name_or_path=str(TOY / "judge"), **changes)[-2:]
    assert first["train/kl"] == second["train/kl"] == 0 and first["train/entropy"] != second["train/entropy"]


def test_unusable_rewards_end_the_run_before_stage_1(tiny_model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / "judge")
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "reward.py").write_text("def reward(prompts, **_): return [None] * len(prompts)")
    unusable = {"other": "other does not have the policy's vocabulary", "reward.py": "not finite in rows .0."}
    unusable[tiny_model("gemma2", **SCORER, attn_logit_softcapping=0.5)] = "rows of .* cannot be packed"
    for reward, message in unusable.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            metrics_of(tiny_model(), tmp_path, reward_name_or_path=str(tmp_path / reward))
        rlhf.dist.destroy_process_group()
    assert not (tmp_path / "run").exists()


def test_lora(tiny_model, tmp_path):
    """The stages, of 4 steps each, leave whole models that are as good as those with adapters."""
    rates = {"sft_learning_rate": 1e-2, "reward_learning_rate": 1e-2}
    rows = metrics_of(tiny_model(), tmp_path, lora_rank=4, batch_size=2, **rates)
    sft = load_plain(tmp_path / "run/sft")
    reward_model = load_plain(tmp_path / "run/reward_model", SCORER["head"])
    assert {file.parent.name for file in tmp_path.glob("run/*/adapter_*")} == {"model"}
    pairs = rlhf.encode_rows(start("rlhf_ppo", tiny_model()), text_pairs(4), "test")
    loss = -torch.cat([naive_logps(sft, pair.prompt_ids, pair.chosen_ids) for pair in pairs]).mean().item()
    chosen = sum(naive_scores(reward_model, pair.prompt_ids, pair.chosen_ids)[-1].item() for pair in pairs)
    rejected = sum(naive_scores(reward_model, pair.prompt_ids, pair.rejected_ids)[-1].item() for pair in pairs)
    assert loss == pytest.approx(rows[4]["eval/loss"], rel=1e-4) and loss < rows[0]["eval/loss"] - 0.01
    assert (chosen - rejected) / 4 == pytest.approx(rows[8]["eval/reward_model/rewards/margins"], rel=1e-3)
