"""SimPO: its loss from single token log-probabilities, and that it has no reference."""

import math

import pytest
import torch
from conftest import load_script, make_batch, read_rows, text_pairs, write_rows

simpo = load_script("simpo")


def tokens_of(lengths, generator):
    return [torch.rand(n, generator=generator, dtype=torch.float64).log().tolist() for n in lengths]


@pytest.mark.parametrize("beta, gamma", [(2.5, 1.375), (10.0, 3.0), (2.0, 0.0)])
def test_loss_is_that_of_the_paper(beta, gamma):
    """Eq. 6: gamma is taken from the difference of the mean log-probabilities, each times beta."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = tokens_of([3, 1, 8, 5], generator), tokens_of([2, 9, 8, 1], generator)
    fields = {"chosen_logps": [sum(row) for row in chosen], "rejected_logps": [sum(row) for row in rejected]}
    fields |= {"chosen_lengths": [len(row) for row in chosen], "rejected_lengths": [len(row) for row in rejected]}
    batch = make_batch(4, **{name: torch.tensor(values, dtype=torch.float64) for name, values in fields.items()})
    losses, metrics = simpo.compute_loss(batch, beta=beta, gamma=gamma, label_smoothing=0.0)
    for i, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        rewards = beta * sum(good) / len(good), beta * sum(bad) / len(bad)
        expected = math.log(1 + math.exp(-(rewards[0] - rewards[1] - gamma)))
        assert losses[i].item() == pytest.approx(expected)
        assert (metrics["rewards/chosen"][i].item(), metrics["rewards/rejected"][i].item()) == pytest.approx(rewards)
        assert metrics["rewards/margins"][i].item() == pytest.approx(rewards[0] - rewards[1])
        assert metrics["rewards/accuracies"][i].item() == float(rewards[0] > rewards[1])


def test_the_reference_does_not_matter():
    batch = make_batch()
    options = {"beta": 2.5, "gamma": 1.25, "label_smoothing": 0.1}
    losses, _ = simpo.compute_loss(batch, **options)
    other, _ = simpo.compute_loss(batch._replace(ref_logps=torch.zeros(2, 5) - 3), **options)
    assert torch.equal(losses, other)


def test_a_step(tiny_model, tmp_path, monkeypatch):
    """No reference is computed, and gamma is beta times the ratio."""
    monkeypatch.delattr(simpo, "add_reference")
    data = write_rows(tmp_path / "data.jsonl", text_pairs(4))
    flags = {"model_name_or_path": tiny_model(), "dataset_name": data, "dataset_test_split": "train"}
    flags |= {"batch_size": 1, "max_steps": 1, "max_new_tokens": 1, "beta": 2.0, "gamma_beta_ratio": 0.3}
    simpo.main(simpo.Args(**flags, output_dir=str(tmp_path / "run")))
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    expected = math.log(1 + math.exp(-(row["train/rewards/margins"] - 0.6)))
    assert row["train/loss"] == pytest.approx(expected, rel=1e-5)
