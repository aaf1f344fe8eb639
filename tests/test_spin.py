"""SPIN: its closed form, its data, and that each iteration plays against the policy of the last one."""

import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import load_script, make_batch, minimise, naive_logps, read_rows, text_pairs, weights_of, write_rows
from test_durable import assert_same, checkpoints, finish, new_folder, run, whole_run

spin = load_script("spin")


@pytest.fixture
def flags(tiny_model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", text_pairs(8))
    paths = {"model_name_or_path": tiny_model(), "dataset_name": data, "output_dir": str(tmp_path / "run")}
    options = {"batch_size": 4, "max_new_tokens": 6, "eval_steps": 1000, "learning_rate": (1e-2,), "num_iterations": 2}
    return paths | options | {"judge_name_or_path": None, "dataset_test_split": "train"}


def run_of(flags):
    args = spin.Args(**flags)
    run = spin.Run(args, spin.Path(args.output_dir), torch.device("cpu"), torch.float32, 2048, None, [0])
    run.tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path)
    return run


@pytest.mark.parametrize("beta", [0.4, 1.0, 2.0])
def test_optimum_of_an_iteration(beta):
    """On a bandit: p_t (p_data / p_t)^(1 / beta), normalised."""
    generator = torch.Generator().manual_seed(0)
    truth, opponent = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    own, other = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    weights = (truth[own] + opponent[other]).exp()

    def loss(theta):
        policy = theta.log_softmax(-1)
        sides = {"chosen_logps": policy[own], "rejected_logps": policy[other]}
        sides |= {"ref_chosen_logps": opponent[own], "ref_rejected_logps": opponent[other]}
        return (weights * spin.compute_loss(make_batch(25, **sides), beta=beta)[0]).sum()

    expected = (opponent + (truth - opponent) / beta).softmax(-1)
    assert (expected - opponent.exp()).abs().max() > 0.05
    torch.testing.assert_close(minimise(loss, 5).softmax(-1), expected, rtol=1e-5, atol=1e-7)


def test_the_data_s_distribution_is_the_fixed_point():
    """On a bandit where truth, opponent and policy are one: the loss is log 2, and its gradient vanishes."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    own, other = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    theta = truth.clone().requires_grad_()
    policy = theta.log_softmax(-1)
    sides = {"chosen_logps": policy[own], "rejected_logps": policy[other]}
    sides |= {"ref_chosen_logps": truth[own], "ref_rejected_logps": truth[other]}
    losses = spin.compute_loss(make_batch(25, **sides), beta=0.3)[0]
    torch.testing.assert_close(losses, torch.full((25,), math.log(2)).double())
    (gradient,) = torch.autograd.grad(((truth[own] + truth[other]).exp() * losses).sum(), theta)
    assert gradient.abs().max() < 1e-12


def test_rows_without_a_rejected_answer(flags):
    """Conversations, prompts with completions and preference pairs give the same truths."""
    turn = {"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "It was great."}
    forms = [
        {"messages": list(turn)},
        {"prompt": [turn[0]], "completion": [turn[1]]},
        {"prompt": [turn[0]], "chosen": [turn[1]], "rejected": [{"role": "assistant", "content": "It was bad."}]},
        {"chosen": list(turn), "rejected": [turn[0], {"role": "assistant", "content": "It was bad."}]},
    ]
    run = run_of(flags)
    train, test = spin.load_truths(run, forms, forms[:1], 0)
    assert len(train) == 4 and len(test) == 1
    assert len({(tuple(pair.prompt_ids), tuple(pair.chosen_ids)) for pair in train + test}) == 1
    assert run.tokenizer.decode(train[0].chosen_ids) == "It was great.<|end|>"
    texts = [{"prompt": "So:", "completion": " Great."}, {"prompt": "So:", "chosen": " Great.", "rejected": " Bad."}]
    first, second = spin.load_truths(run, texts, texts, 0)[0]
    assert (first.prompt_ids, first.chosen_ids) == (second.prompt_ids, second.chosen_ids)


def test_a_row_without_an_answer(flags):
    question = [{"role": "user", "content": "So?"}]
    for row in ({"prompt": "So:"}, {"prompt": "So:", "response": "Yes."}, {"messages": question}):
        message = rf"row 7 has the keys {re.escape(str(sorted(row)))}: needed are `messages` that end with an answer"
        with pytest.raises(SystemExit, match=message):
            spin.load_truths(run_of(flags), [{"prompt": "So:", "completion": "Yes."}], [row], 7)


def test_each_iteration_plays_against_the_policy_of_the_last(flags, monkeypatch):
    seen, train = [], spin.train

    def watched(run, policy, pairs_at, num_steps, *rest, **options):
        policy.save_pretrained(run.folder / f"opponent-{len(seen)}")
        seen.append([[replace(pair) for pair in pairs_at(step)] for step in range(num_steps)])
        return train(run, policy, pairs_at, num_steps, *rest, **options)

    monkeypatch.setattr(spin, "train", watched)
    spin.main(spin.Args(**flags))
    folder, initial = spin.Path(flags["output_dir"]), weights_of(flags["model_name_or_path"])
    opponents = [weights_of(folder / f"opponent-{t}") for t in range(2)]
    assert all(torch.equal(opponents[0][name], initial[name]) for name in initial)
    assert not all(torch.equal(opponents[1][name], initial[name]) for name in initial)
    assert [len(batches) for batches in seen] == [2, 4]  # with those of iteration 0 again
    for t, batches in enumerate(seen):
        pairs = sum(batches, [])
        stored = torch.tensor([[pair.ref_chosen_logps, pair.ref_rejected_logps] for pair in pairs])
        torch.testing.assert_close(stored, naive_logps(folder / f"opponent-{t}", pairs), rtol=1e-5, atol=1e-3)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    for first in (rows[0], rows[2]):
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["train/rewards/margins"] == 0
    iterations = [row for row in read_rows(folder / "metrics.jsonl") if "method/iteration" in row]
    assert [(row["step"], row["method/iteration"]) for row in iterations] == [(2, 0), (6, 1)]


def test_answers_are_the_opponents_own(flags):
    """They are drawn from its distribution: their log-probabilities are what its entropy says, not those of others."""
    spin.main(spin.Args(**flags | {"max_steps": 1, "num_iterations": 1, "prompts_per_iteration": 5}))
    rows = read_rows(spin.Path(flags["output_dir"]) / "iteration-0" / "train.jsonl")
    truths = {row["prompt"]: row["chosen"] for row in text_pairs(8)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags["model_name_or_path"])
    assert len(rows) == 5
    for row in rows:
        assert row["chosen"] == truths[row["prompt"]]
        assert row["rejected"] == tokenizer.decode(row["rejected_ids"], skip_special_tokens=True)
        ended = row["rejected_ids"][-1] == 0
        assert len(row["rejected_ids"]) == 6 or ended
        assert 0 not in row["rejected_ids"][:-1]
    assert any(row["rejected_ids"][-1] != 0 for row in rows)  # cut: no end-of-sequence token was added


@pytest.fixture
def settings(monkeypatch):
    """Beta and learning rate of each iteration that is trained."""
    seen, train = [], spin.train

    def watched(run, policy, pairs_at, num_steps, loss_fn, learning_rate, **options):
        seen.append((loss_fn.keywords["beta"], learning_rate))
        return train(run, policy, pairs_at, num_steps, loss_fn, learning_rate, **options)

    monkeypatch.setattr(spin, "train", watched)
    return seen


def test_iterations_have_betas_and_learning_rates_of_their_own(flags, settings):
    own = {"learning_rate": (1e-3, 1e-4), "beta": (0.1, 5.0), "lr_scheduler_type": "constant", "num_iterations": 3}
    spin.main(spin.Args(**flags | own, mix_previous=False))
    rows = [row for row in read_rows(spin.Path(flags["output_dir"]) / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-3] * 2 + [1e-4] * 4)
    assert settings == [(0.1, 1e-3), (5.0, 1e-4), (5.0, 1e-4)]


@pytest.mark.parametrize("toy", [False, True])
def test_default_betas_and_learning_rates(flags, settings, tiny_model, toy):
    """For a real model those of the authors' scripts (uclaml/SPIN, configs/ and scripts/)."""
    own = {"model_name_or_path": tiny_model(cleanpo_toy=toy), "learning_rate": None, "num_iterations": 5}
    spin.main(spin.Args(**flags | own))
    authors = [(0.1, 5e-7), (0.1, 5e-7), (0.1, 1e-7), (5.0, 1e-7), (5.0, 1e-7)]
    assert settings == ([(1.0, 3e-4)] * 5 if toy else authors)
    resolved = json.loads((spin.Path(flags["output_dir"]) / "args.json").read_text())["resolved"]
    assert resolved["beta"][0] == settings[0][0] and resolved["learning_rate"][-1] == settings[-1][1]


def test_empty_answers_and_the_truth_itself_are_left_out(flags, monkeypatch):
    run, generate = run_of(flags), spin.generate
    truths = spin.load_truths(run, text_pairs(8), text_pairs(8), 0)[0]
    run.folder.mkdir()
    run.rollout = transformers.AutoModelForCausalLM.from_pretrained(flags["model_name_or_path"])

    def sometimes_right(run, prompts, *rest):
        answers = generate(run, prompts, *rest)
        return [truths[i].chosen_ids if i in (2, 5) else [0] if i == 7 else answer for i, answer in enumerate(answers)]

    monkeypatch.setattr(spin, "generate", sometimes_right)
    pairs = spin.play(run, truths, "iteration-0/train", 1)
    assert [pair.row for pair in pairs] == [0, 1, 3, 4, 6]
    monkeypatch.setattr(spin, "generate", lambda *_: [truth.chosen_ids for truth in truths])
    with pytest.raises(SystemExit, match="all answers are empty or equal to the ground truth"):
        spin.play(run, truths, "iteration-1/train", 1)


def test_other_scripts_train_on_the_pairs_of_an_iteration(flags, tmp_path):
    dpo = load_script("pre_dpo")
    spin.main(spin.Args(**flags))
    again = {name: flags[name] for name in ("model_name_or_path", "batch_size", "max_new_tokens", "judge_name_or_path")}
    folder = spin.Path(flags["output_dir"]) / "iteration-1"
    dpo.main(dpo.Args(**again, dataset_name=str(folder), output_dir=str(tmp_path / "dpo")))
    assert (tmp_path / "dpo" / "model_outputs.json").exists()


def test_only_evaluating(flags):
    spin.main(spin.Args(**flags, max_steps=0))
    (row,) = read_rows(spin.Path(flags["output_dir"]) / "metrics.jsonl")
    assert row["step"] == 0 and row["eval/kl"] == 0


@pytest.mark.parametrize("wrong", [{"beta": (0.0,)}, {"beta": ()}, {"learning_rate": (1e-3, -1.0)}])
def test_betas_and_learning_rates_are_checked(flags, wrong):
    with pytest.raises(SystemExit, match="--beta must be above 0"):
        spin.main(spin.Args(**flags | wrong))
    assert not spin.Path(flags["output_dir"]).exists()


STOPS = {  # with 20 rows, two epochs and 8 pairs a step: clip_grad_norm_ 1 to 6 in iteration 0, 7 to 16 in iteration 1
    "while pairs are written": 'at(script, "replace_file", 0, kill, about="iteration-1/train")',
    "between pairs and reference": 'at(script, "save_file", 0, kill, about="iteration-1/reference")',
    "while the iteration is logged": 'at(script, "log_iteration", 1, kill)',
    "in iteration 1": 'at(optimisation, "clip_grad_norm_", 9, kill)',
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "6"])
@pytest.mark.parametrize("when", STOPS)
def test_killed_runs_go_on_in_their_iteration(when, steps):
    folder, flags = new_folder(), ("--mix-previous",)
    killed = run("spin", folder, "--save-steps", steps, *flags, patch=STOPS[when])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finish("spin", folder, "--save-steps", steps, *flags, "--resume")
    assert_same(folder, whole_run("spin", *flags))


SIGNALS = {
    'at(script, "play", 3, terminate)': "checkpoint-7",  # between the iterations: the next step is the last
    'at(optimisation, "clip_grad_norm_", 9, terminate)': "checkpoint-9",
}


@pytest.mark.slow
@pytest.mark.parametrize("patch, checkpoint", SIGNALS.items())
def test_stopped_in_iteration_1(patch, checkpoint):
    folder, flags = new_folder(), ("--mix-previous",)
    stopped = run("spin", folder, *flags, patch=patch)
    assert stopped.returncode == 128 + signal.SIGTERM and checkpoints(folder) == [checkpoint]
    finish("spin", folder, *flags, "--resume")
    assert_same(folder, whole_run("spin", *flags))
