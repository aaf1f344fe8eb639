"""SimPO: its loss in closed form, and that it has no reference."""

import math

import pytest
from conftest import load_script, make_batch, read_rows

simpo = load_script("simpo")


@pytest.mark.parametrize("beta, gamma", [(2.5, 1.375), (10.0, 3.0), (2.0, 0.0)])
def test_loss_is_that_of_the_paper(beta, gamma):
    """Eq. 6: gamma is subtracted from the difference of the mean log-probabilities, each times beta."""
    batch = make_batch()
    losses, metrics = simpo.compute_loss(batch, beta=beta, gamma=gamma, label_smoothing=0.0)
    for i in range(5):
        chosen, rejected = (beta * batch.logps / batch.lengths)[:, i].tolist()
        assert losses[i].item() == pytest.approx(math.log(1 + math.exp(-(chosen - rejected - gamma))))
        assert metrics["rewards/chosen"][i].item() == pytest.approx(chosen)
        assert metrics["rewards/rejected"][i].item() == pytest.approx(rejected)
        assert metrics["rewards/margins"][i].item() == pytest.approx(chosen - rejected)
        assert metrics["rewards/accuracies"][i].item() == float(chosen > rejected)


def test_a_step(data, tmp_path, monkeypatch):
    """No reference is computed, and gamma is beta times the ratio."""
    monkeypatch.delattr(simpo, "add_reference")
    flags = {"dataset_name": str(data), "batch_size": 1, "max_steps": 1, "max_new_tokens": 1}
    simpo.main(simpo.Args(**flags, beta=2.0, gamma_beta_ratio=0.3, output_dir=str(tmp_path / "run")))
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    expected = math.log(1 + math.exp(-(row["train/rewards/margins"] - 0.6)))
    assert row["train/loss"] == pytest.approx(expected, rel=1e-5)
