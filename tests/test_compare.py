"""benchmarks/compare.py without training: the runs it plans, its statistics, and its report."""

import json
import math
import re
import shlex
import statistics
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT, load_script, write_rows

compare = load_script("benchmarks/compare")
RESULTS = ROOT / "benchmarks" / "results.json"
pytestmark = pytest.mark.slow


def write_run(folder, evals, extra=None, flags=None):
    """A finished run with the answers' (score, length, logratio) by step; extra: further values of metrics rows."""
    samples, rows = [], []
    for step, answers in evals.items():
        score, length, kl = np.mean(answers, axis=0)
        row = {"step": step, "eval/judge_score": score, "eval/response_length": length, "eval/kl": kl}
        rows.append(row | {"eval/win_rate": 0.5, "eval/rewards/accuracies": 0.75, "eval/rewards/margins": 0.2 * step})
        rows[-1] |= {"train/rewards/margins": 0.1} | (extra or {}).get(step, {})
        rows[-1] |= {"progress/seconds": 10.0 * step, "perf/peak_memory_gb": 0.5}
        samples += [dict(zip(("step", *compare.COLUMNS), (step, *answer, True), strict=True)) for answer in answers]
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", samples)
    record = {"args": flags or {"beta": 0.1}, "versions": {"torch": "1", "transformers": "2"}}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "model_outputs.json").write_text("[]")


START = [(0.0, 20, 0.0), (1.0, 20, 0.0), (-1.0, 20, 0.0), (-2.0, 20, 0.0)]


@pytest.fixture
def args(tmp_path):
    return compare.Args(runs_dir=tmp_path / "runs", seeds=3, more_seeds=4)


@pytest.fixture
def full(args):
    """Runs of all names whose scores, lengths and KLs are made up, each seed with its own luck."""
    for number, (name, seed) in enumerate(compare.plan(args)):
        noise = np.random.default_rng(number).normal(size=(3, 8, 3)) * (0.3, 0.5, 0.2)
        strength = 1 + (number % 5) / 4
        steps = (32, 95, 158) if name == "spin" else (10, 20, 30)
        evals = {0: [(0.0, 20, 0.0)] * 8}
        for k, step in enumerate(steps):
            mean = np.array([strength * (k + 1) / 3, 20 - k, strength * (k + 1)])
            evals[step] = (mean + noise[k]).tolist()
        extra = {step: {"eval/reward_model_score": float(step)} for step in steps}
        extra[10] = extra.get(10, {}) | {"method/weight_auc": 0.9 + seed / 100}
        if name == "spin":
            extra |= {step: {"method/iteration": t} for t, step in enumerate(steps)}
        write_run(args.runs_dir / f"{name}__{seed}", evals, extra)
    return args


# === The runs ===


@pytest.mark.parametrize("name", compare.RUNS)
def test_commands_parse(name, args):
    script, *flags = compare.command(args, (name, 2), args.runs_dir)
    source = re.search(r"(\w+)\.py$", script)[1]
    source = compare.COPIES.get(source, [source])[0]
    parsed = tyro.cli(load_script(source).Args, args=flags)
    assert parsed.seed == 2 and parsed.num_eval_prompts == 1024


def test_strengths_have_the_default_in_the_middle():
    for method, (flag, values) in compare.CURVES.items():
        default = getattr(load_script(method).Args, flag.split("--")[-1].replace("-", "_"))
        if method in ("spin", "ipo"):
            assert default is None
            default = load_script(method).Args.DEFAULTS["beta"][2]  # on the test bed
            default = default[0] if method == "spin" else default
        elif method == "oaif":
            assert default is None
            default = 0.1  # see test_offline_runs_have_the_betas_of_oaif
        assert default == values[1]
        assert compare.CURVE_RUNS[method][1] == ("rlhf_ppo_kl_coef_0.05" if method == "rlhf_ppo" else method)


def test_offline_runs_have_the_betas_of_oaif():
    text = (ROOT / "oaif.py").read_text(encoding="utf-8")
    assert text.count('{"dpo": 0.1, "ipo": 1.0, "slic": 0.002}[args.loss]') == 1
    betas = [shlex.split(compare.RUNS[f"offline_{loss}"])[2] for loss in ("dpo", "ipo", "slic")]
    assert list(map(float, betas)) == [0.1, 1.0, 0.002]


@pytest.mark.parametrize("copy", compare.COPIES)
def test_the_replaced_text_occurs_once(copy):
    source, old, new = compare.COPIES[copy]
    text = (ROOT / f"{source}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1 and new not in text
    changed = compare.script_text(copy)
    assert changed.count(new) == 1 and old not in changed
    compile(changed, copy, "exec")


def test_order_of_runs():
    jobs = compare.plan(compare.Args())
    assert len(jobs) == len(set(jobs)) and {name for name, _ in jobs} == set(compare.RUNS)
    assert jobs[:7] == [(name, 1) for name in compare.METHODS] and jobs[7] == ("dpo", 2)
    assert {("dpo_beta_eff", 5), ("offline_slic", 5)} < set(jobs) and not {("ipo", 4), ("oaif_shorter", 4)} & set(jobs)
    assert all(jobs.index(compare.needs(job)) <= jobs.index(job) for job in jobs)
    assert compare.needs(("offline_slic", 2)) == ("annotate", 2)


def test_commands_have_no_path_of_a_machine(args):
    text = " ".join(compare.shown(args, (name, 1)) for name in compare.RUNS)
    assert str(ROOT) not in text and str(args.runs_dir) not in text and sys.executable not in text


def test_a_failing_run_stops_no_other(args, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    lines = ["import os, sys", "name, folder = sys.argv[1], sys.argv[3]", "os.makedirs(folder)"]
    lines += ["if name in ('ipo', 'annotate'): sys.exit('error: as asked')"]
    lines += ["open(folder + '/model_outputs.json', 'w')"]
    script.write_text("\n".join(lines))
    monkeypatch.setattr(compare, "command", lambda args, job, runs="": [str(script), job[0]])
    (args.runs_dir / "logs").mkdir(parents=True)
    names = ["dpo", "ipo", "annotate", "simpo", "offline_dpo"]
    failures = compare.run_all(args, [(name, 1) for name in names])
    assert failures.pop(("offline_dpo", 1)) == "annotate__1 has failed" and len(failures) == 2
    for name in ("ipo", "annotate"):
        assert failures[name, 1].startswith("exit status 1\n") and failures[name, 1].endswith("\nerror: as asked")
    assert [compare.done(args, (name, 1)) for name in names] == [True, False, False, True, False]


# === Statistics ===


def test_estimate():
    result = compare.estimate({1: np.array([1.0, 3.0]), 2: np.array([3.0, 3.0]), 4: np.array([5.0, 3.0])})
    assert result["values"] == [2, 3, 4] and result["mean"] == 3 and result["seeds"] == [1, 2, 4]
    assert result["ci95"] == pytest.approx(4.303 / math.sqrt(3))  # the standard deviation is 1
    assert result["ci95_prompts"] == pytest.approx(0)  # both prompts have the mean 3
    assert compare.estimate({1: 2.0}) == {"mean": 2.0, "ci95": None, "values": [2.0], "seeds": [1]}


def test_length_controlled_win_rate():
    generator = np.random.default_rng(0)
    extra_length = generator.normal(5, 8, size=20000).round()
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(extra_length / extra_length.std()))))
    wins = (generator.random(20000) < chance).astype(float)
    truth = 1 / (1 + math.exp(-0.4))
    assert wins.mean() > truth + 0.05
    assert compare.length_controlled_win_rate(wins, extra_length) == pytest.approx(truth, abs=0.015)


def test_length_controlled_win_rate_at_the_edge():
    wins = np.array([1.0, 0.5, 0.0, 1.0])
    assert compare.length_controlled_win_rate(wins, np.zeros(4)) == pytest.approx(wins.mean(), abs=1e-3)
    assert 0.99 < compare.length_controlled_win_rate(np.ones(64), np.arange(64.0)) < 1


def test_gap_of_curves():
    first = [(1.0, np.array([2.0, 0.0])), (0.0, np.array([0.0, 0.0])), (2.0, np.array([2.0, 0.0]))]  # any order
    second = [(0.5, np.array([1.0, -1.0])), (1.5, np.array([1.0, -1.0]))]
    # At 0.5, 0.75, 1, 1.25, 1.5 the first prompt has 1, 1.5, 2, 2, 2 and 1, the second 0 and -1.
    assert compare.gap(first, second) == pytest.approx([0.7, 1.0])
    assert compare.gap(first, second, share=1.0) == pytest.approx([1.0, 1.0])
    assert compare.gap(first, [(3.0, np.zeros(2))]) is None


@pytest.mark.parametrize(
    "values, above, verdict",
    [
        ([1.0, 1.1, 0.9], 0, "holds"),
        ([-0.01, 0.0, 0.01], -0.05, "holds"),
        ([-0.01, 0.0, 0.01], 0, "not decidable at this size"),
        ([-1.0, -1.1, -0.9], 0, "does not hold"),
        ([0.0, 0.0, 0.0], 0, "does not hold"),
        ([1.0], 0, "not decidable at this size"),
        ([None, None], 0, "not decidable at this size"),
        ([], 0, "missing runs"),
    ],
)
def test_verdicts(values, above, verdict):
    results = {seed: [value] for seed, value in enumerate(values)}
    assert compare.compare({seed: ["result"] for seed in results}, lambda _: None, above)["undefined"] == list(results)
    folded = iter(values)
    assert compare.compare({s: ["result"] for s in results}, lambda _: next(folded), above)["verdict"] == verdict


# === The report ===


def test_aggregates(args):
    for seed in (1, 2, 3):
        final = [(1.0 + seed, 10, 2.0), (1.0, 20, 2.0), (-3.0, 30, 2.0), (0.0, 40, 2.0 + seed)]
        write_run(args.runs_dir / f"dpo__{seed}", {0: START, 5: [(0.0, 1, 9.0)] * 4, 7: final})
    for seed in (1, 2):
        write_run(args.runs_dir / f"ipo__{seed}", {0: START, 7: [(4.0, 10, 1.0), (1, 20, 1), (-1, 30, 1), (1, 40, 1)]})
    (args.runs_dir / "simpo__1").mkdir()  # begun, and not finished
    results = compare.aggregate(args)
    run = results["runs"]["dpo"]
    assert run["judge_score"]["values"] == [0, 0.25, 0.5] and run["seeds"] == [1, 2, 3]
    assert run["judge_score"]["ci95"] == pytest.approx(4.303 * 0.25 / math.sqrt(3), abs=1e-4)
    assert run["win_rate"]["mean"] == (1 + 0.5 + 0 + 1) / 4
    assert run["response_length"]["mean"] == 25 and run["eos_rate"]["mean"] == 1
    assert run["kl"]["values"] == [2.25, 2.5, 2.75] and run["reward_accuracy"]["mean"] == 0.75
    assert run["seconds"]["mean"] == 70 and run["peak_memory_gb"]["mean"] == 0.5
    gap = results["runs"]["ipo"]["judge_score_less_dpo"]
    assert gap["values"] == [1.25, 1.0] and gap["seeds"] == [1, 2]
    by_prompt = [4 - 2.5, 0, 2, 1]
    assert gap["ci95_prompts"] == pytest.approx(1.96 * statistics.stdev(by_prompt) / 2, abs=1e-4)
    initial = results["runs"]["initial policy"]
    assert (
        initial["judge_score"]["mean"] == -0.5 and initial["win_rate"]["mean"] == initial["lc_win_rate"]["mean"] == 0.5
    )
    assert {"ipo__3", "simpo__1", "rlhf_ppo__1"} <= set(results["missing"]) and "dpo__3" not in results["missing"]
    text = compare.report(results)
    assert "\n| ipo (2) | 1.25 ± 0.00 | +1.12 ± 1.59 |" in text
    assert "\n| simpo" not in text and "simpo__1" in text.split("Missing:")[1]
    assert {claim["verdict"] for claim in results["claims"]} == {"missing runs"}


def test_runs_with_other_flags_are_left_out(args):
    for seed, line in ((1, compare.shown(args, ("dpo", 1))), (2, "python dpo.py --beta 0.2")):
        write_run(args.runs_dir / f"dpo__{seed}", {0: START, 7: START})
        (args.runs_dir / "logs").mkdir(exist_ok=True)
        (args.runs_dir / "logs" / f"dpo__{seed}.txt").write_text(line + "\nand more")
    book, remarks = compare.load(args)
    assert list(book) == [("dpo", 1)] and [remark.split()[0] for remark in remarks] == ["dpo__2"]


def test_runs_of_other_code_are_named(args):
    text = compare.script_text("dpo")
    texts = [text, text.replace("the paper has 0.1", "a comment"), text.replace("lr_scheduler_type: ", "lr: ")]
    texts += [text.replace("Losses and metrics of the pairs, (B,) each", "A docstring"), text.replace("beta * h", "h")]
    for seed, other in enumerate(texts, 1):
        write_run(args.runs_dir / f"dpo__{seed}", {0: START, 7: START})
        (args.runs_dir / f"dpo__{seed}" / "dpo.py").write_text(other)
    args.seeds = args.more_seeds = 5
    book, remarks = compare.load(args)
    assert len(book) == 5 and remarks == ["With another version of dpo.py: dpo__3, dpo__5"]


def test_claims(full):
    results = compare.aggregate(full)
    assert results["missing"] == []
    assert set(compare.MORE_SEEDS) < set(compare.CLAIMS)
    checks = {}
    for claim in results["claims"]:
        seeds = 4 if claim["number"] in compare.MORE_SEEDS else 3
        for check in claim["comparisons"]:
            assert "mean" in check and len(check["seeds"]) + len(check["undefined"]) == seeds
            checks[check["text"]] = check
    auc = checks["AUC of true against flipped labels less 0.5: guide DPO"]
    assert auc["values"] == pytest.approx([0.41, 0.42, 0.43, 0.44]) and auc["verdict"] == "holds"
    # The margin in nats is the reward's, 0.1, divided by beta; the target is 1 / (2 beta) = 5.
    assert next(check for text, check in checks.items() if text.startswith("IPO"))["mean"] == pytest.approx(4)
    # Scores grow to the end, so that no fall can be seen and the proxy gains nothing after the peak.
    assert checks["judge score: at its peak less at the end"]["verdict"] != "holds"
    assert [point["step"] for point in results["paths"]["spin"]] == [0, 32, 95, 158]
    assert results["paths"]["dpo_sign"][-1]["margin"] == pytest.approx(0.2 * 30 / 0.1)
    text = compare.report(results)
    assert all(f"{number}. {claim}" in text for number, claim in compare.CLAIMS.items())
    assert "Missing: nothing." in text and compare.report(json.loads(json.dumps(results))) == text


def test_judge_fall_is_measured_on_other_prompts(args):
    evals = {0: START, 10: [(5.0, 20, 1.0), (1, 20, 1), (5, 20, 1), (3, 20, 1)], 20: [(0.0, 20, 2.0)] * 4}
    write_run(
        args.runs_dir / "ppo", evals, {10: {"eval/reward_model_score": 1.0}, 20: {"eval/reward_model_score": 4.0}}
    )
    result = compare.Result(args.runs_dir / "ppo")
    assert compare.peak(result) == 10 and list(compare.judge_fall(result)) == [1, 3] and compare.proxy_gain(result) == 3


def test_figures_are_the_same_each_time(full, tmp_path):
    pytest.importorskip("matplotlib")
    results, texts = compare.aggregate(full), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        compare.draw(results, tmp_path / name)
        texts.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert texts[0] == texts[1]
    assert set(texts[0]) == {f"{name}.{suffix}" for name in ("frontier", "lengths") for suffix in ("svg", "png")}


# === What is committed ===


def test_report_agrees_with_the_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == compare.report(results)
