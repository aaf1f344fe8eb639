"""RLHF: PPO's optimum, advantages and losses against plain loops, the reward model's traps, and the three stages."""

import json
import math
import signal

import peft
import pytest
import torch
import transformers
from conftest import load_script, read_rows, text_pairs, weights_of, write_rows
from test_durable import assert_same, checkpoints, copy_of, finish, metrics_of, new_folder, run, whole_run

rlhf = load_script("rlhf_ppo")

CAUSAL = ["llama", "llama-untied", "qwen3", "gemma2", "gpt2"]
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [13, 14]]
ANSWERS = [[20, 21, 0], [22, 23, 24, 25, 26, 0], [0], [27, 28, 29, 30]]  # the last one does not end
PLAIN = {"gamma": 1.0, "gae_lambda": 0.95}
CLIP = {"clip_range": 0.2, "value_clip_range": 0.2}


@pytest.fixture
def flags(tiny_model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", text_pairs(8))
    paths = {"model_name_or_path": tiny_model(), "dataset_name": data, "output_dir": str(tmp_path / "run")}
    options = {"batch_size": 4, "rollouts_per_step": 4, "max_new_tokens": 6, "eval_steps": 1000, "ppo_epochs": 2}
    options |= dict.fromkeys(["learning_rate", "sft_learning_rate", "reward_learning_rate"], 1e-3)
    return paths | options | {"judge_name_or_path": None, "dataset_test_split": "train"}


def run_of(flags, **changes):
    """A run with its policy, at the beginning of stage 3."""
    args = rlhf.Args(**flags | changes)
    rlhf.Path(args.output_dir).mkdir(exist_ok=True)
    run = rlhf.start_run(args)
    return run, rlhf.load_policy(run, args.model_name_or_path)


def models_of(run, policy, tiny_model, reference="llama-untied"):
    """Models of one vocabulary, each with weights of its own."""
    value_model, reward_model = (
        rlhf.load_scorer(run, tiny_model(family, "SequenceClassification", num_labels=1), torch.float32)
        for family in ("llama", "qwen3")
    )
    reference = rlhf.load_model(run, tiny_model(reference), torch.float32)
    return {"policy": policy, "value_model": value_model, "reference": reference, "reward_model": reward_model}


def naive_token_logps(model, prompt, answer, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = (logits / temperature).log_softmax(-1)
    return torch.stack([logps[len(prompt) + t - 1, token] for t, token in enumerate(answer)])


def naive_scores(model, prompt, answer):
    """The scalar head by hand, before each answer token and after the last, from a row without padding."""
    hidden = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[-1][0]
    return model.score(hidden)[len(prompt) - 1 :, 0].double()


def naive_advantages(rewards, values, gamma, gae_lambda):
    """By the definition, of one answer: sums of discounted temporal differences."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(rewards))]


# === PPO in small ===


@pytest.mark.parametrize("kl_coef", [0.7, 1.2])
def test_optimum(kl_coef):
    """Answers of two tokens: pi_ref exp(r / kl_coef), normalised over answers."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    reference = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)  # of the first, then second
    theta = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T

    def logps_of(table):
        return torch.stack([table[0, first], table[1 + first, second]], dim=1)  # (answers, tokens)

    for _ in range(2500):
        policy = theta.log_softmax(-1).detach()
        old = logps_of(policy)
        rewards = -kl_coef * (old - logps_of(reference))
        rewards[:, 1] += reward[first, second]
        later = (policy[1:].exp() * (reward - kl_coef * (policy[1:] - reference[1:]))).sum(1)  # of each first token
        now = (policy[0].exp() * (later - kl_coef * (policy[0] - reference[0]))).sum()
        values = torch.stack([now.expand(9), later[first]], dim=1)
        advantages, returns = rlhf.estimate_advantages(rewards, values, **PLAIN)
        for _ in range(4):
            logps = logps_of(theta.log_softmax(-1))
            losses, value_losses, _ = rlhf.compute_loss(logps, values, old, values, advantages, returns, **CLIP)
            (gradient,) = torch.autograd.grad((old.sum(1).exp()[:, None] * losses).sum(), theta)
            theta.data -= gradient
    expected = (logps_of(reference).sum(1) + reward.flatten() / kl_coef).softmax(-1)
    torch.testing.assert_close(logps_of(theta.log_softmax(-1)).sum(1).exp(), expected, rtol=1e-4, atol=1e-6)
    assert (expected - logps_of(reference).sum(1).exp()).abs().max() > 0.05


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.3)])
def test_advantages(gamma, gae_lambda):
    lengths, generator = [4, 1, 7], torch.Generator().manual_seed(0)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).double()
    rewards, values = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * mask
    advantages, returns = rlhf.estimate_advantages(rewards, values, gamma, gae_lambda)
    for i, length in enumerate(lengths):
        expected = naive_advantages(rewards[i, :length].tolist(), values[i, :length].tolist(), gamma, gae_lambda)
        assert advantages[i, :length].tolist() == pytest.approx(expected, abs=1e-12)
        expected = [a + v for a, v in zip(expected, values[i, :length].tolist(), strict=True)]
        assert returns[i, :length].tolist() == pytest.approx(expected, abs=1e-12)
    wider = rlhf.estimate_advantages(
        *(torch.nn.functional.pad(x, (0, 3)) for x in (rewards, values)), gamma, gae_lambda
    )
    assert torch.equal(wider[0][:, :7], advantages)


def test_whitening():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 4 + 7
    mask = (torch.arange(5) < torch.tensor([[3], [1], [5]])).double()
    whitened, kept = rlhf.whiten(values, mask), values[mask == 1]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(whitened[mask == 1], expected)
    assert (whitened[mask == 0] == 0).all()
    torch.testing.assert_close(rlhf.whiten(values.masked_fill(mask == 0, 1e6), mask), whitened)


def test_losses_are_clipped_on_the_harmful_side_only():
    """For ratios 0.5, 1.1 and 1.5 with good and bad tokens; for values far and near."""
    ratios = torch.tensor([0.5, 1.1, 1.5]).repeat(2, 1).double()
    advantages = torch.tensor([[2.0], [-2.0]]).expand(2, 3).double()
    zeros = torch.zeros(2, 3).double()
    losses, _, metrics = rlhf.compute_loss(ratios.log(), zeros, zeros, zeros, advantages, zeros, **CLIP)
    expected = [[-2 * 0.5, -2 * 1.1, -2 * 1.2], [2 * 0.8, 2 * 1.1, 2 * 1.5]]
    torch.testing.assert_close(losses, torch.tensor(expected).double())
    assert metrics["method/clip_fraction"].tolist() == [[1, 0, 1]] * 2
    values, old, returns = torch.tensor([[0.1, 1.0, 1.0], [-1.0, 0.3, 0.0]]).double(), zeros, zeros + 0.5
    _, losses, _ = rlhf.compute_loss(zeros, values, zeros, old, advantages, returns, **CLIP)
    expected = [[0.5 * 0.4**2, 0.5 * 0.5**2, 0.5 * 0.5**2], [0.5 * 1.5**2, 0.5 * 0.3**2, 0.5 * 0.5**2]]
    torch.testing.assert_close(losses, torch.tensor(expected).double())


# === Models with a scalar head ===


@pytest.mark.parametrize("family", CAUSAL)
def test_scores_are_those_of_the_model_itself(family, flags, tiny_model):
    """At the last token, whether it ends the answer or not; one row at a time, and padded on the left."""
    run, _ = run_of(flags)
    path = tiny_model(family, "SequenceClassification", num_labels=1)
    model = rlhf.load_scorer(run, path, torch.float32)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        rewards = rlhf.rewards_of(model, PROMPTS, ANSWERS)
        alone = torch.cat([plain(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        torch.testing.assert_close(rewards, alone, rtol=1e-4, atol=1e-4)
        width = max(map(len, rows))
        padded = torch.tensor([[1] * (width - len(row)) + row for row in rows])
        mask = (padded != 1).long()
        plain.config.pad_token_id = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = plain(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 0]
        torch.testing.assert_close(rewards, logits, rtol=1e-4, atol=1e-4)
        scores = rlhf.token_scores(model, PROMPTS, ANSWERS)
    for row, prompt, answer in zip(scores, PROMPTS, ANSWERS, strict=True):
        expected = naive_scores(plain, prompt, answer).float()
        torch.testing.assert_close(row[: len(answer) + 1], expected, rtol=1e-4, atol=1e-4)
        assert (row[len(answer) + 1 :] == 0).all()


def test_padding_of_a_reward_model_ends_no_answer(flags, tiny_copy):
    """Also where the tokenizer pads with its end-of-sequence token, or with nothing."""
    for pad in ("<|end|>", None, "<|pad|>"):
        folder = tiny_copy()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["pad_token"] = pad
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        run, _ = run_of(flags, model_name_or_path=str(folder))
        model = rlhf.load_scorer(run, str(folder), torch.float32)
        assert model.config.pad_token_id not in run.stop_ids and model.config.num_labels == 1
        assert (pad != "<|pad|>") or model.config.pad_token_id == 1


def test_head_of_a_new_reward_model(flags, tiny_model):
    """N(0, 1 / sqrt(d + 1)), and the same in all processes."""
    run, _ = run_of(flags)
    path = tiny_model(hidden_size=512)
    heads = [rlhf.load_scorer(run, path, torch.float32).score.weight for _ in range(2)]
    assert torch.equal(*heads) and heads[0].shape == (1, 512)
    assert heads[0].std().item() == pytest.approx(1 / math.sqrt(513), rel=0.15)


TEMPLATES = {
    "as it is": None,
    "a line break behind the end": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "no end": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_saved_reward_model_judges_as_it_was_trained(template, flags, tmp_path):
    """The scores that any script's --judge-name-or-path gives are those of the answers' last tokens in training."""
    dpo = load_script("pre_dpo")
    if TEMPLATES[template]:
        (tmp_path / "template.jinja").write_text(TEMPLATES[template])
        flags = flags | {"chat_template": str(tmp_path / "template.jinja")}
    rlhf.main(rlhf.Args(**flags, sft_epochs=0, max_steps=1))
    folder = rlhf.Path(flags["output_dir"])
    shared = {name: value for name, value in flags.items() if name in dpo.Args.__annotations__}
    args = dpo.Args(**shared | {"output_dir": str(tmp_path / "other")})
    other = dpo.start_run(args)
    dpo.load_policy(other, args.model_name_or_path)
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
        for row in text_pairs(8)
    ]
    pairs = dpo.encode_rows(other, rows, "rows")
    model, tokenizer = dpo.load_judge(other, str(folder / "reward_model"))
    texts = [row["chosen"][0]["content"] for row in rows]
    scores = dpo.judge(other, model, tokenizer, [row["prompt"] for row in rows], texts)
    prompts, answers = [pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs]
    assert all(answer[-1] == 0 for answer in answers)
    with torch.no_grad():
        expected = rlhf.rewards_of(model, prompts, answers)
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 1e-3


def test_saved_reward_model_judges_plain_text(flags, tiny_copy, tmp_path):
    folder = tiny_copy()
    (folder / "chat_template.jinja").unlink()
    run, _ = run_of(flags, model_name_or_path=str(folder))
    tokenizer = rlhf.judge_tokenizer(run)
    messages = [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": " Great."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "How was it? Great.<|end|>"


# === One step of each stage ===


def test_sft_step(flags):
    """The loss and the gradient are those of transformers with the prompts masked."""
    run, policy = run_of(flags)
    pairs = rlhf.load_pairs(run, *rlhf.read_splits(run.args))[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(flags["model_name_or_path"], dtype=torch.float32)
    rows = [pair.prompt_ids + pair.chosen_ids for pair in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    labels = [[-100] * len(p.prompt_ids) + p.chosen_ids for p in pairs]
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    run.args.max_grad_norm, run.args.lr_scheduler_type = 1e9, "constant"
    rlhf.train_sft(run, policy, [pairs], 0.0, dict)
    (row,) = read_rows(run.folder / "metrics.jsonl")
    assert row["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["train/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 10_000])
def test_reward_model_step(micro_batch_tokens, flags):
    run, _ = run_of(flags, micro_batch_tokens=micro_batch_tokens)
    pairs = rlhf.load_pairs(run, *rlhf.read_splits(run.args))[0]
    probs = torch.tensor([1.0, 0.3] * (len(pairs) // 2), dtype=torch.float64)
    for pair, prob in zip(pairs, probs.tolist(), strict=True):
        pair.preference_prob = prob
    model, plain = (rlhf.load_scorer(run, flags["model_name_or_path"], torch.float32) for _ in range(2))
    margins = []
    for pair in pairs:
        chosen, rejected = (
            naive_scores(plain, pair.prompt_ids, ids)[-1] for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        margins.append(chosen - rejected)
    margins = torch.stack(margins)
    losses = probs * torch.log1p(torch.exp(-margins)) + (1 - probs) * torch.log1p(torch.exp(margins))
    losses.mean().backward()
    found, found_margins = rlhf.compare(run, model, pairs)
    torch.testing.assert_close(found, losses.detach().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_margins, margins.detach().float(), rtol=1e-4, atol=1e-4)
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout(temperature, flags, tiny_model):
    """Log-probabilities, rewards, advantages and returns against a plain loop over the answers, in float64."""
    run, policy = run_of(flags, rollout_temperature=temperature, missing_eos_score=-3.0, max_new_tokens=12)
    models = models_of(run, policy, tiny_model)
    shift, kl_coef, prompts = 0.25, 0.3, PROMPTS * 8
    rollout, metrics = rlhf.roll_out(run, models, prompts, shift, kl_coef)
    ended = [answer[-1] == 0 for answer in rollout.answers]
    assert 0 < sum(ended) < len(ended) and metrics["method/eos_rate"] == pytest.approx(sum(ended) / len(ended))
    all_advantages, kls, scores = [], [], []
    with torch.no_grad():
        for i, (prompt, answer) in enumerate(zip(prompts, rollout.answers, strict=True)):
            logps = naive_token_logps(policy, prompt, answer, temperature)
            kl = logps - naive_token_logps(models["reference"], prompt, answer, temperature)
            scores.append(naive_scores(models["reward_model"], prompt, answer)[-1].item() - shift if ended[i] else -3.0)
            rewards = (-kl_coef * kl).tolist()
            rewards[-1] += scores[-1]
            values = naive_scores(models["value_model"], prompt, answer)[:-1].tolist()
            advantages = naive_advantages(rewards, values, **PLAIN)
            returns = [a + v for a, v in zip(advantages, values, strict=True)]
            length = len(answer)
            assert rollout.mask[i].tolist() == [1] * length + [0] * (rollout.mask.shape[1] - length)
            assert rollout.logps[i, :length].tolist() == pytest.approx(logps.tolist(), abs=1e-3)
            assert rollout.returns[i, :length].tolist() == pytest.approx(returns, abs=1e-3)
            for tensor in rollout[3:]:
                assert (tensor[i, length:] == 0).all()
            all_advantages.append(torch.tensor(advantages))
            kls.append(kl.sum().item())
    flat = torch.cat(all_advantages)
    flat = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(rollout.advantages[rollout.mask == 1], flat, rtol=1e-3, atol=1e-3)
    assert metrics["method/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-3)
    assert metrics["method/reward_model_score"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_gradient_of_an_update(micro_batch_tokens, flags, tiny_model):
    """That of one sum over all tokens, divided by their number, whatever the micro-batches."""
    run, policy = run_of(flags, micro_batch_tokens=micro_batch_tokens, rollout_temperature=0.8, value_coef=0.3)
    models = models_of(run, policy, tiny_model)
    generator, shape = torch.Generator().manual_seed(0), (4, 6)
    mask = (torch.arange(6) < torch.tensor([[len(answer)] for answer in ANSWERS])).float()
    advantages, returns, noise, old_values = torch.randn(4, *shape, generator=generator) * mask
    with torch.no_grad():
        old = [naive_token_logps(policy, p, a, 0.8).float() for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    old_logps = torch.nn.utils.rnn.pad_sequence(old, batch_first=True) + 0.3 * noise
    rollout = rlhf.Rollout(PROMPTS, ANSWERS, mask, old_logps, old_values, advantages, returns)
    total, tokens = 0.0, sum(map(len, ANSWERS))
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        logps, values = (
            naive_token_logps(policy, prompt, answer, 0.8),
            naive_scores(models["value_model"], prompt, answer),
        )
        for t in range(len(answer)):
            ratio, advantage = (logps[t] - old_logps[i, t]).exp(), advantages[i, t]
            total += torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)) / tokens
            near = old_values[i, t] + (values[t] - old_values[i, t]).clamp(-0.2, 0.2)
            total += 0.3 * 0.5 * torch.max((values[t] - returns[i, t]) ** 2, (near - returns[i, t]) ** 2) / tokens
    total.backward()
    expected = {}
    for name in ("policy", "value_model"):
        expected[name] = [weight.grad.clone() for weight in models[name].parameters()]
        models[name].zero_grad()
    rlhf.accumulate(run, models, rollout)
    for name, gradients in expected.items():
        for weight, gradient in zip(models[name].parameters(), gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=2e-3, atol=2e-5)


# === Runs ===


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_rollout_is_the_reference_s_own(temperature, flags):
    rlhf.main(rlhf.Args(**flags, rollout_temperature=temperature))
    rows = [row for row in read_rows(rlhf.Path(flags["output_dir"]) / "metrics.jsonl") if "method/kl" in row]
    assert [row["step"] for row in rows] == [5, 6]
    assert rows[0]["method/kl"] == 0 and rows[1]["method/kl"] != 0
    assert all(row["method/first_ratio_error"] == 0 and row["method/ratio_error"] > 0 for row in rows)


def test_stages_start_from_each_other_s_results(flags, monkeypatch):
    seen = []

    def watched(run, path, *rest):
        seen.append(rlhf.Path(path).name)
        return load_policy(run, path, *rest)

    load_policy = rlhf.load_policy
    monkeypatch.setattr(rlhf, "load_policy", watched)
    rlhf.main(rlhf.Args(**flags))
    folder = rlhf.Path(flags["output_dir"])
    assert seen == [rlhf.Path(flags["model_name_or_path"]).name, "sft"]
    initial, sft, final = (weights_of(path) for path in (flags["model_name_or_path"], folder / "sft", folder / "model"))
    assert all(not torch.equal(initial[name], sft[name]) for name in initial)
    assert all(not torch.equal(sft[name], final[name]) for name in initial)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert ["eval/kl" in row for row in rows] == [True, False, True, False, False, False, True]
    assert "eval/reward_accuracy" in rows[4] and "eval/reward_model_score" in rows[6]


def test_shift_brings_the_sft_model_s_answers_to_0(flags):
    rlhf.main(rlhf.Args(**flags | {"rollouts_per_step": 8}, max_steps=1))
    folder = rlhf.Path(flags["output_dir"])
    run, _ = run_of(flags, output_dir=str(folder.parent / "again"), model_name_or_path=str(folder / "sft"))
    prompts = [pair.prompt_ids for pair in rlhf.plan_batches(rlhf.Args(batch_size=8), run_pairs(run))[0]]
    answers = rlhf.generate(run, prompts, 1.0, 1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "reward_model", dtype=torch.float32
    )
    with torch.no_grad():
        scores = [naive_scores(model.eval(), p, a)[-1].item() for p, a in zip(prompts, answers, strict=True)]
    assert json.loads((folder / "reward_shift.json").read_text()) == pytest.approx(sum(scores) / 8, abs=1e-4)


def run_pairs(run):
    return rlhf.load_pairs(run, *rlhf.read_splits(run.args))[0]


def test_a_reward_model_that_exists(flags, tiny_model, tmp_path):
    other = tiny_model("qwen3", "SequenceClassification", num_labels=1)
    rlhf.main(rlhf.Args(**flags, reward_model_name_or_path=other, sft_epochs=0))
    folder = rlhf.Path(flags["output_dir"])
    assert not (folder / "sft").exists() and not (folder / "reward_model").exists()
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2]


def test_reward_models_that_cannot_serve(flags, tiny_model, tiny_copy):
    other = tiny_copy("llama", "SequenceClassification", num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    for path, words in ((str(other), "another vocabulary"), (tiny_model("llama"), "no score head")):
        with pytest.raises(SystemExit, match=words):
            rlhf.main(rlhf.Args(**flags, reward_model_name_or_path=path))
        assert not rlhf.Path(flags["output_dir"]).exists()


def test_adaptive_coefficient(flags):
    """1 + clip(KL / target - 1, -0.2, 0.2) * answers / 10,000, and the coefficient of a step is that of the last."""
    rlhf.main(rlhf.Args(**flags, adaptive_kl_target=1e-6, num_train_epochs=2))
    rows = [row for row in read_rows(rlhf.Path(flags["output_dir"]) / "metrics.jsonl") if "method/kl" in row]
    coefficient = 0.05
    for row in rows:
        assert row["method/kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        coefficient *= 1 + max(-0.2, min(0.2, row["method/kl"] / 1e-6 - 1)) * 4 / 10_000
    first, *_, last = (row["method/kl_coef"] for row in rows)
    assert first == pytest.approx(0.05) and last > 0.05


def test_only_evaluating(flags):
    rlhf.main(rlhf.Args(**flags, max_steps=0))
    (row,) = read_rows(rlhf.Path(flags["output_dir"]) / "metrics.jsonl")
    assert row["step"] == 0 and row["eval/kl"] == 0
    assert not (rlhf.Path(flags["output_dir"]) / "sft").exists()


# === Stopped runs: 3 steps of SFT, 3 of the reward model, 6 of PPO with two updates, each with three calls to clip ===

CLIP_CALLS = {"in SFT": (2, 1), "in the reward model": (5, 4), "in PPO": (14, 7)}  # number of the call, last checkpoint
STOPS = {when: f'at(optimisation, "clip_grad_norm_", {call}, kill)' for when, (call, _) in CLIP_CALLS.items()}
STOPS |= {f"before the result of stage {n} is saved": f'at(script, "save_stage", {n}, kill)' for n in (1, 2)}
STOPS |= {"at the beginning of PPO": 'at(script, "find_shift", 1, kill)', "in the middle of a rollout": ""}
STOPS["in the middle of a rollout"] = 'at(script, "roll_out", 3, kill)'


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "1"])
@pytest.mark.parametrize("when", STOPS)
def test_killed_runs_go_on_in_their_stage(when, steps):
    folder, flags = new_folder(), ("--adaptive-kl-target", "0.01")
    killed = run("rlhf_ppo", folder, "--save-steps", steps, *flags, patch=STOPS[when])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if steps == "1" and when in CLIP_CALLS:
        assert checkpoints(folder) == [f"checkpoint-{CLIP_CALLS[when][1]}"]
    finish("rlhf_ppo", folder, "--save-steps", steps, *flags, "--resume")
    assert_same(folder, whole_run("rlhf_ppo", *flags))


SIGNALS = {f'at(optimisation, "clip_grad_norm_", {call}, terminate)': last + 1 for call, last in CLIP_CALLS.values()}
SIGNALS['at(script, "save_stage", 1, terminate)'] = 4  # between the stages: the next step is the last


@pytest.mark.slow
@pytest.mark.parametrize("patch, last", SIGNALS.items())
def test_signals(patch, last):
    folder = new_folder()
    stopped = run("rlhf_ppo", folder, patch=patch)
    assert stopped.returncode == 128 + signal.SIGTERM and checkpoints(folder) == [f"checkpoint-{last}"]
    assert f"--resume --output-dir {folder}" in stopped.stdout
    finish("rlhf_ppo", folder, "--resume")
    assert_same(folder, whole_run("rlhf_ppo"))


@pytest.mark.slow
@pytest.mark.parametrize("when", CLIP_CALLS)
def test_a_gradient_that_is_not_finite_stops_the_run(when):
    folder, (call, last) = new_folder(), CLIP_CALLS[when]
    spoil = "lambda weights, *_: [w.grad.fill_(float('nan')) for w in weights if w.grad is not None]"
    stopped = run(
        "rlhf_ppo", folder, "--save-steps", "1", patch=f'at(optimisation, "clip_grad_norm_", {call}, {spoil})'
    )
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert f"error: step {last + 1}: a gradient is not finite" in stopped.stderr
    assert checkpoints(folder) == [f"checkpoint-{last}"]


LORA = ("--lora-rank", "4")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), LORA, ("--sft-epochs", "0", *LORA)], ids=["full", "lora", "lora without SFT"])
def test_two_processes_give_what_one_gives(flags):
    from test_distributed import assert_close

    assert_close(whole_run("rlhf_ppo", *flags, processes=2), whole_run("rlhf_ppo", *flags))


@pytest.mark.slow
def test_batches_that_do_not_divide():
    from test_distributed import assert_close
    from test_durable import data_folder

    flags = ["--dataset-name", data_folder(15), "--num-eval-prompts", 7, "--batch-size", 7, "--rollouts-per-step", 7]
    one = whole_run("rlhf_ppo", *flags, "--num-train-epochs", 1)
    assert_close(whole_run("rlhf_ppo", *flags, "--num-train-epochs", 1, "--micro-batch-tokens", 300, processes=2), one)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), LORA], ids=["full", "lora"])
def test_resume_on_two_processes(flags):
    from test_distributed import assert_close

    for call in (5, 14):
        folder = new_folder()
        patch = f'at(optimisation, "clip_grad_norm_", {call}, kill)'
        run("rlhf_ppo", folder, "--save-steps", 1, *flags, patch=patch)
        finish("rlhf_ppo", folder, "--resume", "--save-steps", 1, *flags, processes=2)
        assert_close(folder, whole_run("rlhf_ppo", *flags))


@pytest.mark.slow
def test_lora(tmp_path):
    """Stages are saved as whole models, the policy as an adapter of stage 1's; the KL is to the initial policy."""
    folder = whole_run("rlhf_ppo", *LORA)
    sft = transformers.AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32)
    assert not [name for name in sft.state_dict() if "lora" in name]
    scorer, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "reward_model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and scorer.config.num_labels == 1
    policy = peft.PeftModel.from_pretrained(sft, folder / "model")
    assert policy.peft_config["default"].base_model_name_or_path == str(folder / "sft")
    rows = metrics_of(folder)
    assert rows[0]["eval/kl"] == 0 and all(row["method/first_ratio_error"] == 0 for row in rows if "method/kl" in row)
    last = [row for row in read_rows(folder / "samples.jsonl") if row["step"] == rows[-1]["step"]]
    assert sum(row["logratio"] for row in last) / len(last) == pytest.approx(rows[-1]["eval/kl"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--gradient-checkpointing",), ("--gradient-checkpointing", *LORA)], ids=["full", "lora"]
)
def test_gradient_checkpointing_changes_no_result(flags):
    from test_distributed import assert_close

    assert_close(whole_run("rlhf_ppo", *flags), whole_run("rlhf_ppo", *flags[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_bfloat16(processes):
    rows = metrics_of(whole_run("rlhf_ppo", "--dtype", "bfloat16", processes=processes))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    exact = metrics_of(whole_run("rlhf_ppo"))
    assert [row.keys() for row in rows] == [row.keys() for row in exact]
    assert rows[1]["train/loss"] == pytest.approx(exact[1]["train/loss"], abs=1e-2)
    first = next(row for row in rows if "method/kl" in row)
    assert first["method/kl"] == pytest.approx(0, abs=1e-6) and first["method/first_ratio_error"] == 0


@pytest.mark.slow
def test_a_finished_run_s_folder(tmp_path):
    folder = copy_of(whole_run("rlhf_ppo"))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("args.json", "rlhf_ppo.py", "metrics.jsonl", "samples.jsonl", "model_outputs.json", "model"),
        *("sft", "reward_model", "reward_shift.json", "reference_logps.safetensors"),
    }
