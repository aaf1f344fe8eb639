"""IPO: its closed forms, and that its margin stays where DPO's grows."""

import pytest
import torch
from conftest import load_script, make_batch, minimise, read_rows, text_pairs, write_rows

dpo, ipo = load_script("dpo"), load_script("ipo")
PLAIN = {"normalize": False, "label_smoothing": 0.0}


def bandit_policy(script, pairs, actions, **options):
    """The minimiser of a loss over policies on `actions` answers, with a uniform reference."""
    first, second = torch.tensor(pairs).T
    reference = torch.zeros(actions, dtype=torch.float64).log_softmax(-1)

    def loss(theta):
        policy = theta.log_softmax(-1)
        sides = {"chosen_logps": policy[first], "rejected_logps": policy[second]}
        sides |= {"ref_chosen_logps": reference[first], "ref_rejected_logps": reference[second]}
        return script.compute_loss(make_batch(len(pairs), script=script.__name__, **sides), **options)[0].mean()

    return minimise(loss, actions).softmax(-1)


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_and_gradient(normalize):
    lengths = {"chosen_lengths": torch.tensor([2.0, 3, 5, 7, 1]), "rejected_lengths": torch.tensor([4.0, 1, 5, 2, 9])}
    batch = make_batch(**lengths)
    batch.logps.requires_grad_()
    losses, metrics = ipo.compute_loss(batch, beta=0.2, normalize=normalize, label_smoothing=0.0)
    gradients = torch.autograd.grad(losses.sum(), batch.logps)[0]
    for i in range(5):
        chosen, rejected = (batch.logps - batch.ref_logps)[:, i].tolist()
        a, b = (lengths["chosen_lengths"][i], lengths["rejected_lengths"][i]) if normalize else (1, 1)
        h = chosen / a - rejected / b
        assert losses[i].item() == pytest.approx((h - 2.5) ** 2)
        assert gradients[0][i].item() == pytest.approx(2 * (h - 2.5) / a)
        assert gradients[1][i].item() == pytest.approx(-2 * (h - 2.5) / b)
        assert metrics["rewards/chosen"][i].item() == pytest.approx(0.2 * chosen)
        assert metrics["rewards/rejected"][i].item() == pytest.approx(0.2 * rejected)
        assert metrics["rewards/margins"][i].item() == pytest.approx(0.2 * (chosen - rejected))
        assert metrics["rewards/accuracies"][i].item() == float(chosen > rejected)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_optimum_on_an_ordered_bandit(tau):
    """Section 5.4 of the paper, D1: a over b, b over c, a over c. With c = 1 / (2 tau) the logits are 4c/3, 2c/3, 0."""
    expected = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64).div(6 * tau).softmax(-1)
    found = bandit_policy(ipo, [(0, 1), (1, 2), (0, 2)], 3, beta=tau, **PLAIN)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_an_answer_that_never_wins_is_not_excluded(tau):
    """With a over b, b over a, a over c: IPO gives softmax(0, 0, -1 / (2 tau)), DPO gives c nothing."""
    pairs = [(0, 1), (1, 0), (0, 2)]
    expected = torch.tensor([0.0, 0.0, -0.5 / tau], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(bandit_policy(ipo, pairs, 3, beta=tau, **PLAIN), expected, rtol=1e-6, atol=1e-8)
    assert bandit_policy(dpo, pairs, 3, beta=tau, label_smoothing=0.0)[2] < 1e-5


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_margin_on_drawn_labels(share):
    """h settles at (2p - 1) / (2 tau) where a share p of the labels agrees."""
    pairs = [(0, 1)] * round(10 * share) + [(1, 0)] * round(10 * (1 - share))
    policy = bandit_policy(ipo, pairs, 2, beta=0.3, **PLAIN)
    assert (policy[0] / policy[1]).log().item() == pytest.approx((2 * share - 1) / 0.6, abs=1e-6)


def test_margin_settles_where_that_of_dpo_grows(tiny_model, tmp_path):
    """The same answers preferred in many epochs: at beta 0.5 IPO aims at 1 nat."""
    data = write_rows(tmp_path / "data.jsonl", text_pairs(2))
    flags = {"model_name_or_path": tiny_model(initializer_range=0.02), "dataset_name": data}
    flags |= {"dataset_test_split": "train", "max_new_tokens": 1, "eval_steps": 1000}
    flags |= {"batch_size": 4, "num_train_epochs": 100, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    h = {}
    for script in (ipo, dpo):
        folder = tmp_path / script.__name__
        script.main(script.Args(**flags, beta=0.5, output_dir=str(folder)))
        margins = [row["train/rewards/margins"] / 0.5 for row in read_rows(folder / "metrics.jsonl") if row["step"]]
        h[script.__name__] = margins[49], margins[99]
    assert h["ipo"][1] == pytest.approx(1, abs=0.02)
    assert h["dpo"][1] > h["dpo"][0] > 10
