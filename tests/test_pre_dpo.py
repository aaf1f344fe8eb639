"""Pre-DPO: its two stages, its weights and its closed form."""

import json
import math
import shutil
import signal

import pytest
import torch
import transformers
from conftest import load_script, make_batch, minimise, naive_logps, read_rows, text_pairs, weights_of, write_rows
from safetensors.torch import load_file
from test_durable import assert_same, checkpoints, finish, new_folder, run, whole_run

dpo, pre_dpo = load_script("dpo"), load_script("pre_dpo")
QUICK = {"batch_size": 4, "max_new_tokens": 4, "eval_steps": 1000, "learning_rate": 1e-2, "judge_name_or_path": None}


@pytest.fixture
def flags(tiny_model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", text_pairs(8))
    paths = {"model_name_or_path": tiny_model(), "dataset_name": data, "output_dir": str(tmp_path / "run")}
    return QUICK | paths | {"dataset_test_split": "train"}


@pytest.mark.parametrize("betas", [(0.5, 0.5), (1.0, 0.25)])
def test_both_optima_amount_to_dpo_with_a_smaller_beta(betas):
    """On a bandit with Bradley-Terry labels: 1 / beta = 1 / beta_1 + 1 / beta_2."""
    generator = torch.Generator().manual_seed(0)
    reward = 3 * torch.rand(5, generator=generator, dtype=torch.float64)
    initial = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    first, second = torch.cat([torch.combinations(torch.arange(5)), torch.combinations(torch.arange(5)).flip(1)]).T

    def optimum(reference, beta):
        def loss(theta):
            policy = theta.log_softmax(-1)
            sides = {"chosen_logps": policy[first], "rejected_logps": policy[second]}
            sides |= {"ref_chosen_logps": reference[first], "ref_rejected_logps": reference[second]}
            prob = torch.sigmoid(reward[first] - reward[second])
            batch = make_batch(len(first), **sides, preference_prob=prob)
            return pre_dpo.compute_loss(batch, beta=beta, label_smoothing=0.0)[0].mean()

        return minimise(loss, 5).log_softmax(-1)

    guide = optimum(initial, betas[0])
    together = 1 / (1 / betas[0] + 1 / betas[1])
    torch.testing.assert_close(optimum(guide, betas[1]), optimum(initial, together), rtol=1e-5, atol=1e-6)
    assert (guide.exp() - initial.exp()).abs().max() > 0.05


def test_loss_of_a_dpo_guide_is_that_of_dpo():
    batch = make_batch(preference_prob=torch.rand(5, dtype=torch.float64))
    expected = dpo.compute_loss(batch, beta=0.3, label_smoothing=0.1)[0]
    assert torch.equal(pre_dpo.compute_loss(batch, beta=0.3, label_smoothing=0.1)[0], expected)


def test_loss_of_a_simpo_guide_is_that_of_simpo():
    batch = make_batch(chosen_lengths=torch.arange(5) + 1.0, rejected_lengths=5.0 - torch.arange(5))
    options = {"beta": 2.5, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1}
    expected = load_script("simpo").compute_loss(batch, **options)[0]
    assert torch.equal(pre_dpo.compute_simpo_loss(batch, **options)[0], expected)


@pytest.mark.parametrize("guide", ["dpo", "simpo"])
def test_stage_2_starts_again_from_the_initial_policy(flags, guide, monkeypatch):
    initial, starts, train = weights_of(flags["model_name_or_path"]), [], pre_dpo.train

    def watched(run, policy, *rest, **options):
        starts.append({name: weight.clone() for name, weight in policy.state_dict().items()})
        assert run.rollout is policy  # no other model is in memory
        return train(run, policy, *rest, **options)

    monkeypatch.setattr(pre_dpo, "train", watched)
    pre_dpo.main(pre_dpo.Args(**flags, guide=guide))
    assert len(starts) == 2
    for start in starts:
        assert start.keys() == initial.keys() and all(torch.equal(start[name], initial[name]) for name in initial)
    folder = pre_dpo.Path(flags["output_dir"])
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/kl" in row] == [0, 2, 4]
    assert abs(rows[4]["train/loss"] - math.log(2)) > 0.01
    assert [row["train/learning_rate"] for row in rows if "train/loss" in row] == pytest.approx([0.01, 0.01] * 2)
    # The reference is the guide that was saved.
    run = pre_dpo.Run(pre_dpo.Args(**flags), folder, torch.device("cpu"), torch.float32, 2048, None)
    run.tokenizer = transformers.AutoTokenizer.from_pretrained(flags["model_name_or_path"])
    run.stop_ids = [0]
    pairs = pre_dpo.encode_rows(run, text_pairs(8), "rows")
    pairs = [pair for batch in pre_dpo.plan_batches(run.args, pairs) for pair in batch]
    stored = load_file(folder / "guide_logps.safetensors")["chosen_rejected"][:8]
    torch.testing.assert_close(stored, naive_logps(folder / "guide", pairs), rtol=1e-5, atol=1e-3)


def test_weights_are_logged(flags, tmp_path):
    labels = [True, False, 0, 1, None, False, True, False]  # None: not known
    rows = [row | {"label_flipped": label} for row, label in zip(text_pairs(8), labels, strict=True)]
    flags["dataset_name"] = write_rows(tmp_path / "flipped.jsonl", rows)
    pre_dpo.main(pre_dpo.Args(**flags, beta=0.005))
    folder = pre_dpo.Path(flags["output_dir"])
    (logged,) = [row for row in read_rows(folder / "metrics.jsonl") if "method/weight_mean" in row]
    run = pre_dpo.Run(pre_dpo.Args(**flags), folder, torch.device("cpu"), torch.float32, 2048, None, [0])
    run.tokenizer = transformers.AutoTokenizer.from_pretrained(flags["model_name_or_path"])
    pairs = pre_dpo.encode_rows(run, rows, "rows")
    gaps = [naive_logps(path, pairs) for path in (flags["model_name_or_path"], folder / "guide")]
    h = (gaps[0] - gaps[1])[:, 0] - (gaps[0] - gaps[1])[:, 1]
    weights = [1 / (1 + math.exp(0.005 * value)) for value in h.tolist()]
    assert logged["step"] == 3
    assert logged["method/weight_mean"] == pytest.approx(sum(weights) / 8, abs=1e-5)
    low, high = sorted(weights)[3:5]
    assert logged["method/weight_q50"] == pytest.approx((low + high) / 2, abs=1e-5)
    for k in range(10):
        share = sum(k / 10 <= weight < (k + 1) / 10 for weight in weights) / 8
        assert logged[f"method/weight_from_{k / 10}"] == pytest.approx(share)
    wins = [weights[i] > weights[j] for i in (1, 2, 5, 7) for j in (0, 3, 6)]
    assert logged["method/weight_auc"] == pytest.approx(sum(wins) / len(wins))


def test_a_guide_that_exists_already(flags, tmp_path):
    pre_dpo.main(pre_dpo.Args(**flags))
    folder, other = pre_dpo.Path(flags["output_dir"]), tmp_path / "other"
    again = flags | {"output_dir": str(other), "guide_model_name_or_path": str(folder / "guide")}
    pre_dpo.main(pre_dpo.Args(**again))
    assert not (other / "guide").exists() and not (other / "reference_logps.safetensors").exists()
    stage_2, alone = ([row for row in read_rows(f / "metrics.jsonl") if "train/loss" in row] for f in (folder, other))
    assert [row["train/loss"] for row in alone] == [row["train/loss"] for row in stage_2[2:]]
    first, second = (weights_of(f / "model") for f in (folder, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_guide_of_another_vocabulary(flags, tiny_copy, tmp_path):
    guide = tiny_copy()
    file = guide / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another vocabulary"):
        pre_dpo.main(pre_dpo.Args(**flags, guide_model_name_or_path=str(guide)))


def test_only_evaluating(flags):
    pre_dpo.main(pre_dpo.Args(**flags, max_steps=0))
    (row,) = read_rows(pre_dpo.Path(flags["output_dir"]) / "metrics.jsonl")
    assert row["step"] == 0 and row["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


# Its calls: clip_grad_norm_ 1 to 6 in stage 1, 7 to 12 in stage 2.
STOPS = {
    "while the guide is saved": 'at(script, "save_model", 1, kill)',
    "while the guide's log-probabilities are stored": 'at(script, "save_file", 0, kill, about="guide_logps")',
    "at the start of stage 2": 'at(optimisation, "clip_grad_norm_", 7, kill)',
    "late in stage 2": 'at(optimisation, "clip_grad_norm_", 12, kill)',
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "6"])
@pytest.mark.parametrize("when", STOPS)
def test_killed_runs_go_on_in_their_stage(when, steps):
    folder = new_folder()
    killed = run("pre_dpo", folder, "--save-steps", steps, patch=STOPS[when])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finish("pre_dpo", folder, "--save-steps", steps, "--resume")
    assert_same(folder, whole_run("pre_dpo"))


@pytest.mark.slow
def test_stopped_in_stage_2():
    folder = new_folder()
    stopped = run("pre_dpo", folder, patch='at(optimisation, "clip_grad_norm_", 9, terminate)')
    assert stopped.returncode == 128 + signal.SIGTERM and checkpoints(folder) == ["checkpoint-9"]
    shutil.rmtree(folder / "guide")  # it is not needed any more
    finish("pre_dpo", folder, "--resume")
    assert_same(folder, whole_run("pre_dpo"))
