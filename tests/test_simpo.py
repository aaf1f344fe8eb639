"""SimPO: its loss from single token log-probabilities, and that it has no reference."""

import inspect
import math

import pytest
import torch
from conftest import load_script, make_batch

simpo = load_script("simpo")


def tokens_of(lengths, generator):
    return [torch.rand(n, generator=generator, dtype=torch.float64).log().tolist() for n in lengths]


@pytest.mark.parametrize("beta, ratio", [(2.5, 0.55), (10.0, 0.3), (2.0, 0.0)])
def test_loss_is_that_of_the_paper(beta, ratio):
    """Eq. 6: gamma = beta * ratio is taken from the difference of the mean log-probabilities, each times beta."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = tokens_of([3, 1, 8, 5], generator), tokens_of([2, 9, 8, 1], generator)
    fields = {"chosen_logps": [sum(row) for row in chosen], "rejected_logps": [sum(row) for row in rejected]}
    fields |= {"chosen_lengths": [len(row) for row in chosen], "rejected_lengths": [len(row) for row in rejected]}
    batch = make_batch(4, **{name: torch.tensor(values, dtype=torch.float64) for name, values in fields.items()})
    losses, metrics = simpo.compute_loss(batch, beta=beta, gamma_beta_ratio=ratio, label_smoothing=0.0)
    for i, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        rewards = beta * sum(good) / len(good), beta * sum(bad) / len(bad)
        expected = math.log(1 + math.exp(-(rewards[0] - rewards[1] - beta * ratio)))
        assert losses[i].item() == pytest.approx(expected)
        assert (metrics["rewards/chosen"][i].item(), metrics["rewards/rejected"][i].item()) == pytest.approx(rewards)
        assert metrics["logps/chosen"][i].item() == pytest.approx(sum(good) / len(good))


def test_the_reference_does_not_matter():
    batch = make_batch()
    options = {"beta": 2.5, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1}
    losses, _ = simpo.compute_loss(batch, **options)
    other, _ = simpo.compute_loss(batch._replace(ref_chosen_logps=torch.zeros(5) - 3), **options)
    assert torch.equal(losses, other)


def test_the_reference_is_never_computed():
    """KL to the initial model is measured all the same (test_minimal.py)."""
    assert "add_reference(" not in inspect.getsource(simpo.main)
