"""docs/orpo.patch, the worked example of docs/adding-a-method.md."""

import math
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, load_script, read_rows, text_pairs, write_rows
from test_contract import split_regions


@pytest.fixture(scope="module")
def orpo(tmp_path_factory):
    dpo, script = ROOT / "dpo.py", tmp_path_factory.mktemp("patched") / "orpo.py"
    shutil.copy(dpo, script)
    subprocess.run(["patch", "--fuzz=0", script, ROOT / "docs/orpo.patch"], check=True)
    outside, outside_of_dpo = [split_regions(path.read_text().splitlines())[1] for path in (script, dpo)]
    assert outside == outside_of_dpo
    return load_script(str(script.with_suffix("")))


@pytest.mark.parametrize("q", [1.0, 0.7])
def test_loss_and_gradient_are_those_of_the_paper(orpo, q):
    logps = torch.tensor([[-6.0, -40, -0.3], [-9, -7, -50]], dtype=torch.float64, requires_grad=True)
    lengths, prob = torch.tensor([[3.0, 20, 6], [2, 5, 10]]), torch.full((3,), q, dtype=torch.float64)
    losses, _ = orpo.compute_loss(orpo.Batch(logps, torch.zeros(2, 3), lengths, prob), beta=0.3)
    losses.sum().backward()
    for i, ((good, bad), (m, n)) in enumerate(zip(logps.T.tolist(), lengths.T.tolist(), strict=True)):
        p, r = math.exp(good / m), math.exp(bad / n)
        ratio = p / (1 - p) * (1 - r) / r  # Eqs. 4 to 7: -log sigmoid(log ratio) is log(1 + 1 / ratio)
        expected = q * (-good / m + 0.3 * math.log(1 + 1 / ratio)) + (1 - q) * (-bad / n + 0.3 * math.log(1 + ratio))
        slopes = -(1 + 0.3 / (1 + ratio) / (1 - p)) / m, 0.3 / (1 + ratio) / (1 - r) / n  # Eq. 8
        assert losses[i].item() == pytest.approx(expected)
        assert q < 1 or logps.grad[:, i].tolist() == pytest.approx(slopes)


def test_steps_are_those_of_trl(orpo, tiny_model, tmp_path):
    """TRL takes the mean over all tokens of a pass but the first: so prompts are one token, and a pass is one pair."""
    path, rows = tiny_model(), [row | {"prompt": "A"} for row in text_pairs(12)]
    data = {"dataset_name": write_rows(tmp_path / "rows.jsonl", rows), "dataset_test_split": "train"}
    flags = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "beta": 0.3, "output_dir": str(tmp_path / "run")}
    args = orpo.Args(model_name_or_path=path, batch_size=4, num_eval_prompts=0, **data, **flags)
    orpo.main(args)
    trl_tests, trl = pytest.importorskip("test_trl"), pytest.importorskip("trl.experimental.orpo")
    options = trl_tests.COMMON | flags | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    order = [rows[i] for batch in orpo.plan_batches(args, 12) for i in batch]
    theirs = trl_tests.run_theirs(trl.ORPOTrainer, trl.ORPOConfig(**options), trl_tests.load(path), order)[1]
    names = trl_tests.SAME | {"nll_loss": "nll_loss", "log_odds_chosen": "log_odds_chosen"}
    trl_tests.assert_equal(read_rows(tmp_path / "run/metrics.jsonl")[1:], theirs, names)
