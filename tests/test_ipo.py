"""IPO: its loss, its gradient and its optima in closed form."""

import pytest
import torch
from conftest import bandit_optimum, load_script, make_batch

ipo = load_script("ipo")


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_and_gradient(normalize):
    batch = make_batch()
    batch.logps.requires_grad_()
    losses, metrics = ipo.compute_loss(batch, beta=0.2, normalize=normalize, label_smoothing=0.0)
    gradients = torch.autograd.grad(losses.sum(), batch.logps)[0]
    for i in range(5):
        chosen, rejected = (batch.logps - batch.ref_logps)[:, i].tolist()
        a, b = batch.lengths[:, i].tolist() if normalize else (1, 1)
        h = chosen / a - rejected / b
        assert losses[i].item() == pytest.approx((h - 2.5) ** 2)
        assert gradients[0][i].item() == pytest.approx(2 * (h - 2.5) / a)
        assert gradients[1][i].item() == pytest.approx(-2 * (h - 2.5) / b)
        assert metrics["rewards/chosen"][i].item() == pytest.approx(0.2 * chosen)
        assert metrics["rewards/rejected"][i].item() == pytest.approx(0.2 * rejected)
        assert metrics["rewards/margins"][i].item() == pytest.approx(0.2 * (chosen - rejected))
        assert metrics["rewards/accuracies"][i].item() == float(chosen > rejected)


BANDITS = {  # pairs, and the logits of IPO's optimum times 2 tau
    "ordered, D1 of section 5.4": ([(0, 1), (1, 2), (0, 2)], [4 / 3, 2 / 3, 0]),
    "the last one never wins and is not excluded": ([(0, 1), (1, 0), (0, 2)], [0, 0, -1]),
    "a share p of 0.8 agrees: 2p - 1": ([(0, 1)] * 8 + [(1, 0)] * 2, [0.6, 0]),
}


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("case", BANDITS)
def test_optima_on_bandits(case, tau):
    """With a uniform reference."""
    pairs, logits = BANDITS[case]
    reference = torch.zeros(len(logits), dtype=torch.float64).log_softmax(-1)
    expected = (torch.tensor(logits, dtype=torch.float64) / (2 * tau)).softmax(-1)
    found = bandit_optimum(ipo.compute_loss, (tau, False, 0.0), reference, pairs).exp()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
