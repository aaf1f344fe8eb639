"""The loss of DPO in closed form, and what all the losses of pairs have in common."""

import math
import re

import pytest
import torch
from conftest import load_script, make_batch, minimise

dpo = load_script("dpo")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_loss_is_log_2_where_policy_and_reference_agree(prob, smoothing):
    batch = make_batch(preference_prob=torch.full((5,), prob, dtype=torch.float64))
    batch = batch._replace(ref_logps=batch.logps)
    losses, metrics = dpo.compute_loss(batch, beta=0.7, label_smoothing=smoothing)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    for name in ("rewards/chosen", "rewards/rejected"):
        assert metrics[name].abs().max() == 0


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_gradient_is_that_of_the_paper(beta):
    """Section 4 of the paper: -beta sigma(r(y_l) - r(y_w)) [grad log pi(y_w|x) - grad log pi(y_l|x)]."""
    batch = make_batch()
    batch.logps.requires_grad_()
    losses, metrics = dpo.compute_loss(batch, beta=beta, label_smoothing=0.0)
    chosen_gradient, rejected_gradient = torch.autograd.grad(losses.sum(), batch.logps)[0]
    chosen_rewards, rejected_rewards = beta * (batch.logps - batch.ref_logps).detach()
    weight = torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(chosen_gradient, -beta * weight)
    torch.testing.assert_close(rejected_gradient, beta * weight)
    torch.testing.assert_close(metrics["rewards/chosen"].detach(), chosen_rewards)
    torch.testing.assert_close(metrics["rewards/rejected"].detach(), rejected_rewards)
    torch.testing.assert_close(metrics["rewards/margins"].detach(), chosen_rewards - rejected_rewards)
    assert torch.equal(metrics["rewards/accuracies"], (chosen_rewards > rejected_rewards).float())


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_conservative_gradient_vanishes_where_the_policy_is_as_sure_as_the_labels(smoothing):
    """Mitchell 2023: at sigma(beta h) = 1 - epsilon; below it the margin grows, above it shrinks."""
    beta, zeros = 0.2, torch.zeros(3, dtype=torch.float64)
    stationary = math.log((1 - smoothing) / smoothing) / beta
    chosen = torch.tensor([stationary - 1, stationary, stationary + 1], dtype=torch.float64, requires_grad=True)
    batch = make_batch(3, chosen_logps=chosen, rejected_logps=zeros, ref_chosen_logps=zeros, ref_rejected_logps=zeros)
    losses, _ = dpo.compute_loss(batch, beta=beta, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    assert gradient[0] < -1e-4 and abs(gradient[1]) < 1e-12 and gradient[2] > 1e-4


@pytest.mark.parametrize("prob, smoothing", [(1.0, 0.0), (1.0, 0.2), (0.7, 0.0), (0.7, 0.2), (0.0, 0.1)])
def test_soft_labels_and_smoothing_mix_the_two_orders(prob, smoothing):
    batch = make_batch(preference_prob=torch.full((5,), prob, dtype=torch.float64))
    losses, _ = dpo.compute_loss(batch, beta=0.3, label_smoothing=smoothing)
    ratios = batch.logps - batch.ref_logps
    h = ratios[0] - ratios[1]
    p = prob * (1 - smoothing) + (1 - prob) * smoothing
    forth, back = (1 + (-0.3 * h).exp()).log(), (1 + (0.3 * h).exp()).log()
    torch.testing.assert_close(losses, p * forth + (1 - p) * back)


def test_loss_is_finite_far_from_the_reference():
    far = torch.tensor([-1e5, 1e5], dtype=torch.float64)
    losses, _ = dpo.compute_loss(make_batch(2, chosen_logps=far), beta=1.0, label_smoothing=0.1)
    assert losses.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_minimiser_on_a_bandit_is_the_tilted_reference(beta):
    """With all pairs labelled by Bradley-Terry from a reward r, DPO's optimum is pi(y) ~ pi_ref(y) exp(r(y) / beta)."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(6, generator=generator, dtype=torch.float64) * 4 * beta
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    first, second = torch.combinations(torch.arange(6)).T
    first, second = torch.cat([first, second]), torch.cat([second, first])

    def loss(theta):
        policy = theta.log_softmax(-1)
        batch = make_batch(
            len(first),
            chosen_logps=policy[first],
            rejected_logps=policy[second],
            ref_chosen_logps=reference[first],
            ref_rejected_logps=reference[second],
            preference_prob=torch.sigmoid(reward[first] - reward[second]),
        )
        return dpo.compute_loss(batch, beta=beta, label_smoothing=0.0)[0].mean()

    expected = (reference + reward / beta).softmax(-1)
    assert (expected - reference.exp()).abs().max() > 0.1  # or there is nothing to find
    torch.testing.assert_close(minimise(loss, 6).softmax(-1), expected, rtol=1e-6, atol=1e-8)


# === All losses of pairs ===

LOSSES = {
    "dpo": ("dpo", "compute_loss", {"beta": 0.1}),
    "ipo": ("ipo", "compute_loss", {"beta": 0.1, "normalize": False}),
    "ipo, length-normalised": ("ipo", "compute_loss", {"beta": 0.1, "normalize": True}),
    "simpo": ("simpo", "compute_loss", {"beta": 2.5, "gamma": 1.25}),
    "pre_dpo": ("pre_dpo", "compute_loss", {"beta": 0.1}),
    "pre_dpo, guide": ("pre_dpo", "compute_simpo_loss", {"beta": 2.5, "gamma": 1.25}),
}


@pytest.mark.parametrize("prob, smoothing", [(1.0, 0.0), (1.0, 0.2), (0.7, 0.0), (0.7, 0.2), (0.0, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("name", LOSSES)
def test_soft_labels_mix_the_loss_of_a_pair_and_of_the_pair_exchanged(name, prob, smoothing):
    script, function, options = LOSSES[name]
    compute_loss = getattr(load_script(script), function)
    lengths = {"chosen_lengths": torch.tensor([3.0, 1, 4, 1, 5]), "rejected_lengths": torch.tensor([2.0, 7, 1, 8, 2])}
    sides = {f"{side}_logps": 10 * torch.rand(5, dtype=torch.float64) - 20 for side in ("chosen", "rejected")}
    sides |= {f"ref_{name}": 10 * torch.rand(5, dtype=torch.float64) - 20 for name in list(sides)} | lengths
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    others = {re.sub("chosen|rejected", lambda found: swapped[found[0]], name): side for name, side in sides.items()}
    batch, exchanged = make_batch(script=script, **sides), make_batch(script=script, **others)
    forth, back = (compute_loss(b, **options, label_smoothing=0.0)[0] for b in (batch, exchanged))
    assert not torch.allclose(forth, back)
    p = prob * (1 - smoothing) + (1 - prob) * smoothing
    soft = batch._replace(preference_prob=torch.full((5,), prob, dtype=torch.float64))
    losses, _ = compute_loss(soft, **options, label_smoothing=smoothing)
    torch.testing.assert_close(losses, p * forth + (1 - p) * back)
    assert losses.shape == (5,)
