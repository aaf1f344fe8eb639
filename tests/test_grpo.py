"""GRPO: its advantages, losses and optimum, its steps against a naive loop, its data and its rewards."""

import json
import runpy

import pytest
import torch
from conftest import (
    ROOT,
    TOY,
    chat,
    leave_group,
    load_plain,
    load_script,
    naive_logps,
    read_rows,
    start,
    text_pairs,
    weights_of,
    write_rows,
)

grpo = load_script("grpo")
LOSSES = ["grpo", "dr_grpo", "rloo", "dapo"]


def random_rewards(size, seed=0):
    return torch.randn(5, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_of_grpo_are_normalised():
    advantages = grpo.group_advantages(random_rewards(6), "grpo")
    torch.testing.assert_close(advantages.mean(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(advantages.std(1), torch.ones(5, dtype=torch.float64), rtol=1e-3, atol=0)
    assert torch.equal(advantages, grpo.group_advantages(random_rewards(6), "dapo"))


def test_advantages_of_rloo_are_the_gap_to_the_others():
    rewards = random_rewards(4)
    expected = torch.stack([rewards[:, i] - rewards[:, [k for k in range(4) if k != i]].mean(1) for i in range(4)], 1)
    torch.testing.assert_close(grpo.group_advantages(rewards, "rloo"), expected)
    torch.testing.assert_close(grpo.group_advantages(rewards, "dr_grpo"), expected * 3 / 4)


def test_loss_is_clipped_on_the_harmful_side():
    ratios, advantages = torch.tensor([[0.5, 1.1, 1.5]] * 2), torch.tensor([[2.0], [-2.0]]).expand(2, 3)
    losses, metrics = grpo.compute_loss(ratios.log(), 0 * ratios, ratios.log(), advantages, 0.2, 0.3, beta=0.7)
    torch.testing.assert_close(losses, torch.tensor([[-2 * 0.5, -2 * 1.1, -2 * 1.3], [2 * 0.8, 2 * 1.1, 2 * 1.5]]))
    assert metrics["clip_fraction"].tolist() == [[0, 0, 1], [1, 0, 0]] and not metrics["kl"].any()
    _, metrics = grpo.compute_loss(ratios.log(), 0 * ratios, ratios.log(), 0 * advantages, 0.2, 0.3, beta=0.7)
    assert not metrics["clip_fraction"].any()


def test_first_gradient_is_that_of_reinforce():
    logps = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(7, dtype=torch.float64)
    losses, _ = grpo.compute_loss(logps, logps.detach(), logps.detach(), advantages, 0.2, 0.2, beta=0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, -advantages)


def optimum(reward, reference, beta, reward_beta):
    """Where a policy over single tokens ends, with the KL divergence in the loss or in the reward."""
    theta = torch.zeros_like(reward, requires_grad=True)
    for _ in range(4000):
        logps = theta.log_softmax(-1)
        old = logps.detach()
        rewards = reward - reward_beta * (old - reference)
        advantages = rewards - (old.exp() * rewards).sum()
        losses, _ = grpo.compute_loss(logps, old, reference, advantages, 0.2, 0.2, beta)
        (gradient,) = torch.autograd.grad((old.exp() * losses).sum(), theta)
        theta.data -= gradient
    return theta.detach().softmax(-1)


def test_optima():
    """KL in the reward: pi_ref exp(r / beta), normalised. k3: as of KL(pi_ref || pi), beta pi_ref / pi + r is level."""
    generator = torch.Generator().manual_seed(0)
    reward, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    reference = reference.log_softmax(-1)
    expected = (reference + reward / 1.5).softmax(-1)
    torch.testing.assert_close(optimum(reward, reference, 0.0, 1.5), expected, rtol=1e-5, atol=1e-7)
    level = 1.5 * reference.exp() / optimum(reward, reference, 1.5, 0.0) + reward
    torch.testing.assert_close(level, level.mean().expand(5), rtol=1e-5, atol=1e-7)


REWARD = """
def reward(prompts, completions, weight, **columns):
    return [len(text) * float(number) for text, number in zip(completions, weight, strict=True)]
"""
ANSWERS = [[20, 21, 0], [22, 23, 24, 25], [0], [26, 27, 0], [28, 0], [29, 30, 31, 32]]  # two are cut at 4 tokens


@pytest.fixture
def answers(monkeypatch):
    """The same answers in every step, three to each of two prompts."""
    generate = grpo.generate
    monkeypatch.setattr(
        grpo, "generate", lambda run, model, prompts, *rest, **more: generate(run, model, prompts, *rest, **more)
        if len(prompts) != 6 else [list(answer) for answer in ANSWERS]
    )  # fmt: skip


@pytest.mark.parametrize("loss_type, truncated", [*[(name, False) for name in LOSSES], ("dapo", True)])
@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_steps_are_those_of_a_naive_loop(loss_type, truncated, micro_batch_tokens, answers, tiny_model, tmp_path):
    """Two steps of two updates, whatever the micro-batches: rewards, loss and gradient norm."""
    rows = [{"prompt": row["prompt"], "weight": i + 1} for i, row in enumerate(text_pairs(2))]
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    (tmp_path / "reward.py").write_text(REWARD)
    flags = {"dataset_name": str(tmp_path / "data"), "reward_name_or_path": str(tmp_path / "reward.py")}
    flags |= {"num_generations": 3, "batch_size": 6, "num_iterations": 2, "num_train_epochs": 2, "beta": 0.5}
    flags |= {"lr_scheduler_type": "constant", "max_grad_norm": 1e9, "learning_rate": 1e-2, "max_new_tokens": 4}
    flags |= {"micro_batch_tokens": micro_batch_tokens, "loss_type": loss_type, "epsilon": 0.1, "epsilon_high": 0.3}
    flags |= {"mask_truncated_completions": truncated, "output_dir": str(tmp_path / "run")}
    grpo.main(grpo.Args(model_name_or_path=tiny_model(), **flags))
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")[1:]

    run = start("grpo", tiny_model(), **flags)
    policy, reference = load_plain(tiny_model()), load_plain(tiny_model())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    pairs, _ = grpo.load_pairs(run)
    args = run.args
    batches = grpo.plan_batches(grpo.replace(args, batch_size=2), 2)
    for row, batch in zip(logged, batches, strict=True):
        prompts = [pairs[i] for i in batch for _ in range(3)]
        texts = run.tokenizer.batch_decode(ANSWERS, skip_special_tokens=True)
        rewards = [len(text) * float(pair.columns["weight"]) for text, pair in zip(texts, prompts, strict=True)]
        assert row["train/reward"] == pytest.approx(sum(rewards) / 6)
        lines = list(zip([pair.prompt_ids for pair in prompts], ANSWERS, strict=True))
        old, ref = [[naive_logps(model, *line).detach() for line in lines] for model in (policy, reference)]
        if loss_type == "rloo":
            rewards = [r - 0.5 * (o - f).sum().item() for r, o, f in zip(rewards, old, ref, strict=True)]
        advantages = []
        for group in (rewards[:3], rewards[3:]):
            mean = sum(group) / 3
            std = (sum((r - mean) ** 2 for r in group) / 2) ** 0.5 + 1e-4
            scale = {"grpo": 1 / std, "dapo": 1 / std, "dr_grpo": 1, "rloo": 3 / 2}[loss_type]
            advantages += [(r - mean) * scale for r in group]
        for _ in range(2):
            losses = []
            for i, answer in enumerate(ANSWERS):
                logps, total = naive_logps(policy, *lines[i]), 0.0
                for t in range(len(answer)):
                    ratio = (logps[t] - old[i][t]).exp()
                    gain = torch.min(ratio * advantages[i], ratio.clamp(0.9, 1.3) * advantages[i])
                    gap = ref[i][t] - logps[t]
                    total = total - gain + (loss_type != "rloo") * 0.5 * (gap.exp() - gap - 1)
                mean_length = sum(len(a) for a in ANSWERS if a[-1] == 0 or not truncated) / 6
                total = total / {"grpo": len(answer), "dr_grpo": 4, "rloo": 1, "dapo": mean_length}[loss_type]
                losses.append(total * (answer[-1] == 0 or not truncated))
            loss = sum(losses) / 6
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert logged[1]["train/clip_fraction"] > 0  # else clipping would be untested


FLAGS = {"max_steps": 1, "num_generations": 2, "batch_size": 4, "max_new_tokens": 4, "num_eval_prompts": 2}


def run_with(reward, data, tmp_path, model=TOY / "policy", **changes):
    (tmp_path / "reward.py").write_text(f"def reward(prompts, completions, **columns):\n    return {reward}\n")
    flags = FLAGS | {"dataset_name": str(data), "reward_name_or_path": str(tmp_path / "reward.py")} | changes
    grpo.main(grpo.Args(model_name_or_path=str(model), output_dir=str(tmp_path / "run"), **flags))


CUT = {"mask_truncated_completions": True, "max_new_tokens": 1, "loss_type": "dapo"}


@pytest.mark.parametrize("rewards, flags", [("[1000.1 for _ in prompts]", {}), ("range(len(prompts))", CUT)])
def test_equal_rewards_and_masked_answers_change_no_weight(rewards, flags, data, tiny_model, tmp_path):
    run_with(rewards, data, tmp_path, model=tiny_model(), beta=0.0, learning_rate=1.0, **flags)
    before, after = weights_of(tiny_model()), weights_of(tmp_path / "run" / "model")
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    assert (row["train/equal_groups"], row["train/loss"]) == (0 if flags else 1, 0)


@pytest.mark.parametrize("rewards, bad", [("[1.0, None, 1.0, float('inf')]", 2), ("[1.0, 1.0]", 0)])
def test_rewards_that_are_too_few_or_not_finite_end_the_run_and_name_the_rows(rewards, bad, data, tmp_path):
    count = rewards.count(",") + 1
    rows = r"\[\d+, \d+\]" if bad else "none"
    with pytest.raises(SystemExit, match=rf"reward.py has {count} scores for 4 answers, .* rows {rows}$"):
        run_with(rewards, data, tmp_path, num_eval_prompts=4)


@pytest.mark.parametrize(
    "loss_type, beta, high", [("grpo", 0.04, 0.2), ("dr_grpo", 0, 0.2), ("rloo", 0.03, 0.2), ("dapo", 0, 0.28)]
)
def test_defaults_of_a_loss(loss_type, beta, high, data, tmp_path):
    run_with("[0.5 for _ in prompts]", data, tmp_path, loss_type=loss_type, max_steps=0)
    args = json.loads((tmp_path / "run/args.json").read_text())["args"]
    assert (args["beta"], args["epsilon_high"]) == (beta, high)


def test_a_changed_reward_is_refused_on_resuming(data, tmp_path):
    run_with("[0.5 for _ in prompts]", data, tmp_path, max_steps=0)
    (tmp_path / "run/model").rename(tmp_path / "model")  # as if it had been killed
    leave_group()
    with pytest.raises(SystemExit, match="error: data, devices or torch changed"):
        run_with("[0.6 for _ in prompts]", data, tmp_path, max_steps=0, resume=True)


@pytest.mark.parametrize("flags", [{"num_generations": 1}, {"num_generations": 3, "batch_size": 4}])
def test_numbers_that_make_no_groups_end_the_run(flags, data, tmp_path):
    with pytest.raises(SystemExit, match="error: --batch-size must be a multiple of --num-generations"):
        run_with("[]", data, tmp_path, **flags)


def test_each_step_has_its_own_luck(tiny_model, tmp_path):
    data = write_rows(tmp_path / "same.jsonl", [{"prompt": "Review it."}] * 24)
    run_with("[0.5 for _ in prompts]", data, tmp_path, model=tiny_model(), max_steps=2, learning_rate=0.0)
    _, first, second = read_rows(tmp_path / "run/metrics.jsonl")
    assert first["train/kl"] == second["train/kl"] == 0 and first["train/entropy"] != second["train/entropy"]


def test_a_reward_model_as_the_reward(data, tmp_path):
    """The test bed's judge scores the samples and the answers alike."""
    run_with("[]", data, tmp_path, reward_name_or_path=str(TOY / "judge"), learning_rate=0.0)
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    assert row["train/reward_std"] > 0 and row["train/ratio"] == 1 and row["train/kl"] == 0


def test_rows():
    run = start("grpo", TOY / "policy", max_length=40, max_new_tokens=8)  # so prompts of 32 tokens, but not of 33
    rows = [
        {"prompt": "a", "x": 1},
        {"prompt": chat("a"), "x": 2},
        {"prompt": "b", "chosen": chat("a", "b"), "rejected": chat("a", "c")},
    ]
    long = [{"prompt": " ".join("a" * count)} for count in (32, 33)]
    *pairs, longest = grpo.encode_rows(run, rows + long, "train")
    assert run.tokenizer.batch_decode([pair.prompt_ids for pair in pairs]) == ["a", *["<|user|>a<|assistant|>"] * 2]
    assert [pair.columns.get("x") for pair in pairs] == [1, 2, None] and len(longest.prompt_ids) == 32
    with pytest.raises(SystemExit, match="error: row 0 of split train needs a prompt"):
        grpo.encode_rows(run, [{"text": "a"}], "train")


TASKS = [("format", {"constraint": "sentences", "value": "2"}, "One is 3.5 m. Two!", "Just one.")]
TASKS += [("format", {"constraint": "lower case", "value": ""}, "all small.", "Not small.")]
TASKS += [("format", {"constraint": "ending", "value": "The end."}, "Well. The end. ", "The end. Or not.")]
TASKS += [("format", {"constraint": "word", "value": "sea"}, "The Sea.", "A season.")]
TASKS += [("arithmetic", {"answer": "1234"}, "It is 1,234.", "1,235"), ("arithmetic", {"answer": "7"}, "7.0", "7 or 8")]
TASKS += [("arithmetic", {"answer": "so 3 #### -5"}, "-5", "5"), ("arithmetic", {"answer": "7"}, "5-7", "seven 7,8")]


@pytest.mark.parametrize("task, columns, right, wrong", TASKS)
def test_rewards_of_the_tasks(task, columns, right, wrong):
    reward = runpy.run_path(str(ROOT / f"docs/tasks/{task}.py"))["reward"]
    completions = [chat("?", right)[1:], chat("?", wrong)[1:]]
    assert reward([chat("?")] * 2, completions, **{name: [value] * 2 for name, value in columns.items()}) == [1, 0]
