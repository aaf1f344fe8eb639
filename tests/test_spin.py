"""SPIN: its loss and its iterations in closed form, the rows it reads, and what its pairs hold."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TOY, bandit_optimum, load_script, make_batch, naive_greedy, naive_logps, read_rows, start

spin = load_script("spin")
QUESTION = {"role": "user", "content": "How was it?"}
ANSWER, WORSE = [{"role": "assistant", "content": content} for content in ("Great.", "Bad.")]
FORMS = [
    {"messages": [QUESTION, ANSWER]},
    {"prompt": [QUESTION], "completion": [ANSWER]},
    {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WORSE]},
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},
    {"prompt": "How was it?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},  # UltraFeedback
]
BAD_ROWS = [{"prompt": "So:"}, {"prompt": "", "completion": "Yes."}, {"messages": [QUESTION]}, {"chosen": [ANSWER]}]
BAD_ROWS += [{"prompt": [QUESTION], "completion": text} for text in ("Yes.", [ANSWER | {"content": ""}])]


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_loss_and_gradient(beta):
    batch = make_batch()
    batch.logps.requires_grad_()
    losses, _ = spin.compute_loss(batch, beta)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logps)
    for i in range(5):
        truth, own = (batch.logps - batch.ref_logps)[:, i].tolist()
        slope = -beta / (1 + math.exp(beta * (truth - own)))
        assert losses[i].item() == pytest.approx(math.log1p(math.exp(-beta * (truth - own))))
        assert gradient[:, i].tolist() == pytest.approx([slope, -slope])


@pytest.mark.parametrize("beta", [0.4, 1.0, 2.0])
def test_iterations_on_a_bandit(beta):
    """p_t+1 = p_t (p_data / p_t)^(1 / beta), normalised; pairs are as likely as p_data and p_t make them."""
    truth, policy = torch.tensor([[2.0, -1, 0, 1], [0, 1, 1.5, 0]], dtype=torch.float64).log_softmax(-1)
    for _ in range(2):
        expected = (policy + (truth - policy) / beta).softmax(-1)
        weights = (truth[:, None] + policy).exp().flatten()
        policy = bandit_optimum(spin.compute_loss, (beta,), policy, weights=weights)
        torch.testing.assert_close(policy.exp(), expected, rtol=1e-4, atol=1e-6)


def test_forms_of_rows():
    """All forms give the same truth, and no other answer is read."""
    run = start("spin", TOY / "policy")
    strings = {"prompt": "<|user|>How was it?<|assistant|>", "completion": "Great."}
    talk = [QUESTION, WORSE, QUESTION, ANSWER]
    *pairs, last = spin.encode_rows(run, [strings, *FORMS, {"messages": talk}], "train")
    for pair in pairs:
        texts = run.tokenizer.batch_decode([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
        assert texts == ["<|user|>How was it?<|assistant|>", "Great.<|end|>", "<|end|>"]
        assert pair.prompt == ([QUESTION] if pair.row > 0 else strings["prompt"])
    assert last.prompt == talk[:3] and last.chosen_ids == pairs[0].chosen_ids


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
def test_bad_rows_end_the_run(row):
    with pytest.raises(SystemExit, match="^error: row 1 of split test"):
        spin.encode_rows(start("spin", TOY / "policy"), [FORMS[0], row], "test")


@pytest.fixture
def played(data):
    run = start("spin", TOY / "policy", max_new_tokens=20, prompts_per_iteration=5)
    truths = spin.encode_rows(run, read_rows(data / "train.jsonl")[:8], "train")
    return run, spin.load_model(run, str(TOY / "policy")), truths


def test_pairs_of_an_iteration(played, monkeypatch):
    """Each iteration has other prompts; answers and all log-probabilities, old pairs' too, are the opponent's."""
    run, opponent, truths = played
    old = [replace(truths[i], rejected_ids=truths[0].chosen_ids, ref_logps=(99, 99)) for i in (1, 2, 3)]
    generate, calls = spin.generate, []

    def generate_greedily(*args):
        calls.append(args[3:])
        return generate(*args[:4], 1e-6)

    monkeypatch.setattr(spin, "generate", generate_greedily)
    iterations = [spin.play_train(run, opponent, truths, old, seed) for seed in (4, 6)]
    assert calls == [(4, 1.0), (6, 1.0)]  # seeds and temperatures
    for pairs in iterations:
        own = [naive_greedy(opponent, pair.prompt_ids, 20) for pair in pairs[:5]]
        assert [pair.rejected_ids for pair in pairs] == own + [truths[0].chosen_ids] * 3
        assert [pair.row for pair in pairs[5:]] == [1, 2, 3] and len({pair.row for pair in pairs[:5]}) == 5
        for pair in pairs:
            assert replace(pair, rejected_ids=truths[pair.row].rejected_ids, ref_logps=(0.0, 0.0)) == truths[pair.row]
            for answer, logp in zip((pair.chosen_ids, pair.rejected_ids), pair.ref_logps, strict=True):
                expected = naive_logps(opponent, pair.prompt_ids, answer).sum().item()
                assert logp == pytest.approx(expected, rel=1e-4)
    assert {pair.row for pair in iterations[0][:5]} != {pair.row for pair in iterations[1][:5]}


def test_empty_answers_and_the_truth_itself_are_left_out(played, monkeypatch):
    run, opponent, truths = played
    drawn = [pair.row for pair in spin.play_train(run, opponent, truths, [], seed=4)]
    answers = [[0], truths[drawn[1]].chosen_ids, [9, 0], run.tokenizer(" ").input_ids + [0], [9]]
    monkeypatch.setattr(spin, "generate", lambda *_, **options: answers)
    assert [pair.row for pair in spin.play_train(run, opponent, truths, truths[:1], 4)] == [drawn[2], drawn[4], 0]
    monkeypatch.setattr(spin, "generate", lambda *args, **options: [[0]] * 5)
    with pytest.raises(SystemExit, match="^error: too few pairs: the policy's answers are empty"):
        spin.play_train(run, opponent, truths, truths[:1], seed=4)


def test_a_run(data, tmp_path, monkeypatch):
    """Each iteration has a beta and a rate, the last ones repeated, and plays against the policy of its start."""
    folder, opponents, betas, train, loss = tmp_path / "run", [], set(), spin.train_iteration, spin.compute_loss
    monkeypatch.setattr(spin, "train_iteration", lambda *all: opponents.append(copy.deepcopy(all[1])) or train(*all))
    monkeypatch.setattr(spin, "compute_loss", lambda *all: betas.add((len(opponents), all[1])) or loss(*all))
    flags = {"batch_size": 8, "max_new_tokens": 24, "eval_steps": 100, "num_eval_prompts": 6, "num_iterations": 3}
    flags |= {"beta": [1.0, 0.5], "learning_rate": [3e-3, 1e-3], "lr_scheduler_type": "constant"}
    spin.main(spin.Args(**flags, dataset_name=str(data), prompts_per_iteration=8, output_dir=str(folder)))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/iteration"] for row in rows] == [0, 1, 1, 2, 2]
    assert [row["train/learning_rate"] for row in rows] == [3e-3] + [1e-3] * 4
    assert betas == {(1, 1.0), (2, 0.5), (3, 0.5)}
    run, previous, cut_answers = start("spin", TOY / "policy", **flags), [], []
    for t, first in enumerate((rows[0], rows[1], rows[3])):
        assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6) and first["train/rewards/margins"] == 0
        pairs, tests = [json.loads((folder / f"iteration-{t}-{name}.json").read_text()) for name in ("train", "test")]
        answers = [pair["rejected_ids"] for pair in pairs]
        new = answers[: len(answers) - len(previous)]
        assert answers == new + previous and 0 < len(new) <= 8
        previous, cut = new, [len(answer) for answer in answers if answer[-1] != 0]
        assert first["train/cut_answers"] == pytest.approx(len(cut) / len(answers))
        cut_answers += cut
        prompts = [pair["prompt_ids"] for pair in tests]
        with spin.inference(opponents[t]):
            own = spin.generate(run, opponents[t], prompts, 1_000_003 + 2 * t + 1, 1.0)
        assert [pair["rejected_ids"] for pair in tests] == own and len(own) == 6
    assert set(cut_answers) == {24}
