"""Pre-DPO: its losses and its optimum in closed form, and which models its two stages start from and refer to."""

import json
import math
import shutil

import pytest
import torch
from conftest import TOY, bandit_optimum, load_plain, load_script, make_batch, naive_logps, read_rows, start, weights_of
from safetensors.torch import save_file

pre_dpo = load_script("pre_dpo")


@torch.no_grad()
def naive_margins(model, pairs, mean=False):
    """log pi(chosen) - log pi(rejected) of pairs, or the difference of the means over their tokens."""
    margins = []
    for pair in pairs:
        chosen, rejected = [naive_logps(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        margins.append(chosen.mean() - rejected.mean() if mean else chosen.sum() - rejected.sum())
    return torch.stack(margins)


@pytest.mark.parametrize("loss, sibling", [("compute_loss", "dpo"), ("compute_simpo_loss", "simpo")])
def test_losses_are_those_of_dpo_and_simpo(loss, sibling):
    batch = make_batch(preference_prob=torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]))
    options = {"dpo": (0.3, 0.1), "simpo": (2.5, 1.2, 0.1)}[sibling]
    losses, metrics = getattr(pre_dpo, loss)(batch, *options)
    expected, expected_metrics = load_script(sibling).compute_loss(batch, *options)
    torch.testing.assert_close(losses, expected)
    for name in expected_metrics.keys() & metrics.keys():
        torch.testing.assert_close(metrics[name], expected_metrics[name])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_weight_is_that_of_the_gradient(beta):
    """The gradient is -beta weight [grad log pi(y_w) - grad log pi(y_l)]; where policy and guide agree it is 1/2."""
    batch = make_batch()
    batch.ref_logps[:, 0] = batch.logps[:, 0]
    batch.logps.requires_grad_()
    losses, metrics = pre_dpo.compute_loss(batch, beta, 0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logps)
    weight = metrics["weight"].detach()
    torch.testing.assert_close(gradient, torch.stack([-beta * weight, beta * weight]))
    assert metrics["weight"][0] == 0.5


@pytest.mark.parametrize("betas", [(0.5, 0.5), (1.0, 0.25)])
def test_both_optima_amount_to_dpo_with_a_smaller_beta(betas):
    """On a bandit with labels of a reward, by Bradley-Terry: 1 / beta = 1 / b1 + 1 / b2."""
    reward = torch.tensor([2.0, 0, 1.5, 1], dtype=torch.float64)
    initial = torch.tensor([0.0, 1, 2, 0], dtype=torch.float64).log_softmax(-1)
    probs, found = torch.sigmoid(reward[:, None] - reward).flatten(), initial
    for beta in betas:
        found = bandit_optimum(pre_dpo.compute_loss, (beta, 0.0), found, preference_prob=probs)
    expected = (initial + reward * (1 / betas[0] + 1 / betas[1])).softmax(-1)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def existing(tmp_path):
    """A folder with a guide that differs from the policy of the test bed."""
    folder = shutil.copytree(TOY / "policy", tmp_path / "existing")
    weights = {name: 1.1 * weight for name, weight in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


FLAGS = {"batch_size": 8, "max_new_tokens": 4, "num_eval_prompts": 4, "eval_steps": 100, "guide_learning_rate": 1e-3}
FLAGS |= {"lr_scheduler_type": "constant", "guide_beta": 0.2, "beta": 0.3}


@pytest.mark.parametrize("kind", ["dpo", "lora", "simpo", "existing"])
def test_stages(kind, data, existing, tmp_path, monkeypatch):
    """Stage 2 is DPO from the initial policy with the guide as the reference, whatever trained the guide."""
    folder, loss, betas = tmp_path / "run", pre_dpo.compute_loss, []
    monkeypatch.setattr(pre_dpo, "compute_loss", lambda *given: betas.append(given[1]) or loss(*given))
    flags = FLAGS | {"dataset_name": str(data), "guide": "simpo" if kind == "simpo" else "dpo"}
    flags |= {"guide_model_name_or_path": str(existing)} if kind == "existing" else {}
    flags |= {"lora_rank": 4, "learning_rate": 3e-4} if kind == "lora" else {}
    pre_dpo.main(pre_dpo.Args(**flags, output_dir=str(folder)))
    metrics = read_rows(folder / "metrics.jsonl")
    rows = [row for row in metrics if "train/loss" in row]
    assert [row["train/learning_rate"] for row in rows] == [1e-3] * 3 * (kind != "existing") + [3e-4] * 3
    assert list(dict.fromkeys(betas)) == ([0.2] if kind in ("dpo", "lora") else []) + [0.3]

    run = start("pre_dpo", TOY / "policy", **flags)
    initial, guide = load_plain(TOY / "policy"), load_plain(existing if kind == "existing" else folder / "guide")
    pairs, test_pairs = pre_dpo.load_pairs(run)
    batch = [pairs[i] for i in pre_dpo.plan_batches(run.args, 20)[0]]
    h = naive_margins(initial, batch) - naive_margins(guide, batch)
    first = rows[-3]
    assert first["train/loss"] == pytest.approx((1 + (-0.3 * h).exp()).log().mean().item(), rel=1e-4)
    assert abs(first["train/loss"] - math.log(2)) > 0.01
    assert first["train/weight"] == pytest.approx((1 / (1 + (0.3 * h).exp())).mean().item(), rel=1e-4)
    if kind == "simpo":
        gaps = 2.5 * naive_margins(initial, batch, mean=True) - 2.5 * 0.48
        assert rows[0]["train/loss"] == pytest.approx((1 + (-gaps).exp()).log().mean().item(), rel=1e-4)
        margin = 2.5 * naive_margins(guide, test_pairs, mean=True).mean().item()
        assert rows[2]["eval/rewards/margins"] == pytest.approx(margin, rel=1e-4)
    if kind in ("dpo", "lora"):
        assert rows[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
        margin = 0.2 * (naive_margins(guide, test_pairs) - naive_margins(initial, test_pairs)).mean().item()
        assert rows[2]["eval/rewards/margins"] == pytest.approx(margin, rel=1e-3)
    h = naive_margins(load_plain(folder / "model"), test_pairs) - naive_margins(guide, test_pairs)
    assert metrics[-1]["eval/rewards/margins"] == pytest.approx(0.3 * h.mean().item(), rel=1e-3)


def test_a_guide_of_another_vocabulary(existing, data):
    tokenizer = json.loads((existing / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (existing / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = {"dataset_name": str(data), "guide_model_name_or_path": str(existing)}
    with pytest.raises(SystemExit, match="^error: the guide .* does not have the policy's vocabulary"):
        pre_dpo.main(pre_dpo.Args(**flags, output_dir=str(existing.parent / "run")))
