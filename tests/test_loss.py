"""The loss of DPO in closed form, and what all the losses of pairs have in common."""

import pytest
import torch
from conftest import bandit_optimum, load_script, make_batch

dpo = load_script("dpo")


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_loss_and_gradient_are_those_of_the_paper(beta):
    """Section 4 of the paper: -beta sigma(r(y_l) - r(y_w)) [grad log pi(y_w|x) - grad log pi(y_l|x)]."""
    batch = make_batch()
    batch.logps.requires_grad_()
    losses, metrics = dpo.compute_loss(batch, beta=beta, label_smoothing=0.0)
    chosen_gradient, rejected_gradient = torch.autograd.grad(losses.sum(), batch.logps)[0]
    chosen_rewards, rejected_rewards = beta * (batch.logps - batch.ref_logps).detach()
    weight = torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(losses.detach(), (1 + (rejected_rewards - chosen_rewards).exp()).log())
    torch.testing.assert_close(chosen_gradient, -beta * weight)
    torch.testing.assert_close(rejected_gradient, beta * weight)
    torch.testing.assert_close(metrics["rewards/chosen"].detach(), chosen_rewards)
    torch.testing.assert_close(metrics["rewards/rejected"].detach(), rejected_rewards)
    torch.testing.assert_close(metrics["rewards/margins"].detach(), chosen_rewards - rejected_rewards)
    assert torch.equal(metrics["rewards/accuracies"], (chosen_rewards > rejected_rewards).float())


def test_loss_is_finite_far_from_the_reference():
    far = torch.tensor([[-1e5, 1e5], [0.0, 0.0]])
    losses, _ = dpo.compute_loss(make_batch(2, logps=far), beta=1.0, label_smoothing=0.1)
    assert losses.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_minimiser_on_a_bandit_is_the_tilted_reference(beta):
    """With all pairs labelled by Bradley-Terry from a reward r, DPO's optimum is pi(y) ~ pi_ref(y) exp(r(y) / beta)."""
    reward = beta * torch.tensor([2.0, 0.3, 1.5, -1, 1, 0.5], dtype=torch.float64)
    reference = torch.tensor([0.0, 1, 2, 0.5, -1, 0], dtype=torch.float64).log_softmax(-1)
    probs = torch.sigmoid(reward[:, None] - reward).flatten()
    found = bandit_optimum(dpo.compute_loss, (beta, 0.0), reference, preference_prob=probs).exp()
    expected = (reference + reward / beta).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# === All losses of pairs ===

LOSSES = {  # for those of pre_dpo.py see test_pre_dpo.py
    "dpo": ("dpo", {"beta": 0.1}),
    "ipo": ("ipo", {"beta": 0.1, "normalize": False}),
    "ipo, length-normalised": ("ipo", {"beta": 0.1, "normalize": True}),
    "simpo": ("simpo", {"beta": 2.5, "gamma": 1.25}),
}


@pytest.mark.parametrize("prob, smoothing", [(1.0, 0.0), (1.0, 0.2), (0.7, 0.0), (0.7, 0.2), (0.0, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("name", LOSSES)
def test_soft_labels_mix_the_loss_of_a_pair_and_of_the_pair_exchanged(name, prob, smoothing):
    script, options = LOSSES[name]
    compute_loss, batch = load_script(script).compute_loss, make_batch()
    exchanged = make_batch(logps=batch.logps.flip(0), ref_logps=batch.ref_logps.flip(0), lengths=batch.lengths.flip(0))
    forth, back = (compute_loss(b, **options, label_smoothing=0.0)[0] for b in (batch, exchanged))
    assert not torch.allclose(forth, back)
    p = prob * (1 - smoothing) + (1 - prob) * smoothing
    soft = batch._replace(preference_prob=torch.full((5,), prob, dtype=torch.float64))
    losses, _ = compute_loss(soft, **options, label_smoothing=smoothing)
    torch.testing.assert_close(losses, p * forth + (1 - p) * back)
    assert losses.shape == (5,)
