"""All methods on the test bed: the scripts' defaults, three strengths of each method, and claims of their papers.

    python benchmarks/compare.py                          # all runs, then the report; goes on where it was stopped
    python benchmarks/compare.py --quick                  # one seed
    python benchmarks/compare.py --only '^(dpo|ipo)__1$'  # runs whose names match
    python benchmarks/compare.py --report                 # no runs: the report on those that are finished
    python benchmarks/compare.py --max-steps 2 --num-eval-prompts 16 --runs-dir runs/trial --only 'dpo__1'  # a trial

A run is a script with its flags in a process of its own with one thread, in the folder NAME__SEED of --runs-dir.
The report is results.json, results.md, frontier.svg and lengths.svg (and .png), beside this file.

Runs of one seed answer the same prompts with the same random numbers, so runs are compared by the differences of their
answers' scores or lengths, prompt by prompt. Intervals are 95 %: of Student's t over seeds, which decides, and beside
it over prompts, whose differences are averaged over seeds first. A comparison asks whether a difference is above a
threshold: 0, or below 0 by a margin where a claim says "at least". It holds if the interval over seeds lies above the
threshold, does not hold if it lies below, and is not decidable at this size otherwise. A claim holds if all its
comparisons do, and does not hold if one does not. What has not been run is reported as missing.
"""

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # quantile of t, 1 to 9 degrees of freedom
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not decidable at this size", "missing runs"
Job = tuple[str, int]  # name of a run, seed


@dataclass
class Args:
    runs_dir: Path = ROOT / "runs" / "compare"  # folder of the runs
    out_dir: Path | None = None  # folder of the report; None = beside this file, for a trial in --runs-dir
    seeds: int = 3  # runs have the seeds 1 to this, at most 10
    more_seeds: int = 5  # the same for the claims that need more of them
    quick: bool = False  # seed 1 only
    only: str = ""  # regular expression: do the runs in whose NAME__SEED it is found, and what they need
    jobs: int = 2  # runs at a time
    report: bool = False  # do no runs
    num_eval_prompts: int = 1024  # test prompts of an evaluation
    max_steps: int = -1  # for a trial: most optimiser steps of a run


# === The runs: script and flags by name ===

METHODS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "pre_dpo": "Pre-DPO", "spin": "SPIN", "oaif": "OAIF"}
METHODS |= {"rlhf_ppo": "PPO"}
# A method's strength, its default in the middle. All curves start from the initial policy, PPO's too: its default run,
# which has supervised fine-tuning first, is not on its curve.
CURVES = {
    "dpo": ("--beta", [0.03, 0.1, 0.3]),
    "ipo": ("--beta", [0.02, 0.05, 0.15]),
    "simpo": ("--gamma-beta-ratio", [0.275, 0.55, 1.1]),  # moves KL more than --beta does
    "pre_dpo": ("--beta", [0.03, 0.1, 0.3]),
    "spin": ("--beta", [0.3, 1, 3]),
    "oaif": ("--beta", [0.03, 0.1, 0.3]),
    "rlhf_ppo": ("--sft-epochs 0 --kl-coef", [0.02, 0.05, 0.15]),
}
SFT_STEPS = (32, 95, 158)  # those of spin.py at the ends of its iterations, if no answer is dropped
OFFLINE = "--dataset-name {runs}/annotate__{seed} --dataset-train-split annotated --eval-steps 20"
CLAIM_RUNS = {  # by claim, beyond those above
    "2": {
        "dpo_sign": "dpo --num-train-epochs 5 --dataset-name {runs}/sign",
        "ipo_sign": "ipo --num-train-epochs 5 --dataset-name {runs}/sign",
    },
    "3": {"simpo_sum": "simpo_sum"},
    "4": {
        "pre_dpo_simpo": "pre_dpo --guide simpo",
        "dpo_2_epochs": "dpo --num-train-epochs 2",
        "dpo_beta_eff": "dpo --beta 0.05",  # 1 / 0.05 = 1 / 0.1 + 1 / 0.1, the betas of Pre-DPO's two stages
    },
    "5": {f"sft_{steps}": f"sft --num-train-epochs 3 --max-steps {steps}" for steps in SFT_STEPS},
    "6": {
        "annotate": "oaif --learning-rate 0 --eval-steps 1000",
        "online_dpo": "oaif --loss dpo --eval-steps 20",
        "online_ipo": "oaif --loss ipo --eval-steps 20",
        "online_ipo_beta_0.05": "oaif --loss ipo --beta 0.05 --eval-steps 20",  # ipo.py's: with 1.0 little moves here
        "online_slic": "oaif --loss slic --eval-steps 20",
        "offline_dpo": f"dpo --beta 0.1 {OFFLINE}",  # oaif.py's beta of each loss
        "offline_ipo": f"ipo --beta 1.0 {OFFLINE}",
        "offline_ipo_beta_0.05": f"ipo --beta 0.05 {OFFLINE}",
        "offline_slic": f"slic --beta 0.002 {OFFLINE}",
        "oaif_shorter": "oaif --annotator-instruction 'Prefer the shorter review.'",
    },
    "7": {"ppo_no_kl": "rlhf_ppo --sft-epochs 0 --kl-coef 0.0 --eval-steps 10"},
}
# Copies of scripts with one text replaced. 25 is the mean length of the toy's answers in tokens: SimPO's sums are
# divided by this constant, which is beta / 25 with gamma as it was. SFT's sums are scaled in the same way.
DPO_LOSS = "losses = -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)"
AVERAGES = """\
    chosen_logps = batch.chosen_logps / batch.chosen_lengths
    rejected_logps = batch.rejected_logps / batch.rejected_lengths
"""
COPIES = {
    "simpo_sum": ("simpo", AVERAGES, re.sub(r"batch\.\w+_lengths", "25", AVERAGES)),
    "slic": ("dpo", DPO_LOSS, "losses = torch.relu(1 - beta * h)"),
    "sft": ("dpo", DPO_LOSS, "losses = -batch.chosen_logps / 25"),
}


def curve_run(method: str, value: float) -> str:
    """Name of the run with a value of the method's strength."""
    flag, values = CURVES[method]
    default = value == values[1] and method != "rlhf_ppo"
    return method if default else f"{method}_{flag.split('--')[-1].replace('-', '_')}_{value:g}"


CURVE_RUNS = {method: [curve_run(method, value) for value in values] for method, (_, values) in CURVES.items()}
STRENGTHS = {curve_run(m, value): f"{m} {flag} {value:g}" for m, (flag, values) in CURVES.items() for value in values}
RUNS = STRENGTHS | {method: method for method in METHODS}
RUNS |= {name: flags for some in CLAIM_RUNS.values() for name, flags in some.items()}


def plan(args: Args) -> list[Job]:
    """All runs, the most important first."""
    groups = [list(METHODS), list(STRENGTHS), *CLAIM_RUNS.values()]
    jobs = [(name, seed) for names in groups for seed in range(1, args.seeds + 1) for name in names]
    for claim, _, runs, _, _ in COMPARISONS:
        for job in ((name, seed) for seed in seeds_of(args, claim) for name in names_of(runs)):
            jobs += [needs(job), job]
    return list(dict.fromkeys(jobs))


def command(args: Args, job: Job, runs: str | Path = "runs/compare") -> list[str]:
    """Script and flags of a run, from the project's folder."""
    script, *flags = [word.format(runs=runs, seed=job[1]) for word in shlex.split(RUNS[job[0]])]
    common = ["--num-eval-prompts", str(args.num_eval_prompts), "--seed", str(job[1])]
    trial = ["--max-steps", str(args.max_steps)] if args.max_steps >= 0 else []  # a flag's last value counts
    return [f"{runs}/scripts/{script}.py" if script in COPIES else f"{script}.py", *flags, *common, *trial]


def shown(args: Args, job: Job) -> str:
    return shlex.join(["python", *command(args, job)])


def script_text(script: str) -> str:
    """A script of the project, or a copy with its text replaced."""
    source, old, new = COPIES.get(script, (script, "", ""))
    text = (ROOT / f"{source}.py").read_text(encoding="utf-8")
    if old and text.count(old) != 1:
        sys.exit(f"error: {source}.py has the text to replace for {script} {text.count(old)} times:\n{old}")
    return text.replace(old, new) if old else text


def needs(job: Job) -> Job:
    """The run that a run takes its data from, or the run itself."""
    return ("annotate", job[1]) if "annotate__" in RUNS[job[0]] else job


def label(job: Job) -> str:
    return f"{job[0]}__{job[1]}"


def done(args: Args, job: Job) -> bool:
    return (args.runs_dir / label(job) / ("test.jsonl" if job[0] == "annotate" else "model_outputs.json")).exists()


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# === Running them ===


def label_by_judge(rows: list[dict], drop_ties: bool) -> list[dict]:
    """Rows with the answer as chosen to which the judge gives the higher score."""
    sys.path.insert(0, str(ROOT))
    import dpo

    dpo.transformers.utils.logging.disable_progress_bar()
    run = dpo.Run(dpo.Args(), Path(), dpo.torch.device("cpu"), dpo.torch.float32, 2048, None)
    answers = [row[side][-1]["content"] for side in ("chosen", "rejected") for row in rows]
    scores = dpo.judge(run, *dpo.load_judge(run, str(ROOT / "toy" / "judge")), [r["prompt"] for r in rows] * 2, answers)
    labelled = []
    for row, first, second in zip(rows, scores[: len(rows)], scores[len(rows) :], strict=True):
        sides = (row["chosen"], row["rejected"]) if first >= second else (row["rejected"], row["chosen"])
        if first != second or not drop_ties:
            labelled.append({"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]})
    return labelled


def prepare(args: Args, jobs: list[Job]) -> None:
    """Write the copies of scripts and, where a run needs them, the pairs labelled by the judge."""
    for folder in ("scripts", "logs", "sign"):
        (args.runs_dir / folder).mkdir(parents=True, exist_ok=True)
    if not (args.runs_dir / "scripts" / "toy").exists():
        (args.runs_dir / "scripts" / "toy").symlink_to(ROOT / "toy")
    for script in COPIES:
        (args.runs_dir / "scripts" / f"{script}.py").write_text(script_text(script), encoding="utf-8")
    for split in ("test", "train"):
        file = args.runs_dir / "sign" / f"{split}.jsonl"
        if not file.exists() and any("/sign" in RUNS[name] for name, _ in jobs):
            rows = label_by_judge(read_rows(ROOT / "toy" / file.name), drop_ties=split == "train")
            file.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(file.with_suffix(".tmp"), file)


def run_all(args: Args, jobs: list[Job]) -> dict[Job, str]:
    """Do the runs in this order, several at a time; those that failed, with the last lines they wrote."""
    children, futures, failures = set(), {}, {}
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}

    def execute(job: Job) -> str:
        folder, log = args.runs_dir / label(job), args.runs_dir / "logs" / f"{label(job)}.txt"
        if needs(job) in futures and needs(job) != job and futures[needs(job)].result():
            return f"{label(needs(job))} has failed"
        # --resume starts a run where there is none yet.
        words = [sys.executable, *command(args, job, args.runs_dir), "--output-dir", str(folder), "--resume"]
        with log.open("w", encoding="utf-8") as stream:
            print(shown(args, job), file=stream, flush=True)
            options = {"stdout": stream, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": os.environ | env}
            child = subprocess.Popen(words, start_new_session=True, **options)  # so that Ctrl-C comes to us alone
            children.add(child)
            status = child.wait()
            children.discard(child)
        if status == 0 and job[0] == "annotate" and not done(args, job):
            shutil.copyfile(ROOT / "toy" / "test.jsonl", folder / "test.tmp")
            os.replace(folder / "test.tmp", folder / "test.jsonl")
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip() and "%|" not in line]
        return "\n".join([f"exit status {status}", *lines[-8:]]) if status else ""

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), desc="runs") as bar:
        for job in jobs:  # what a run needs is begun before it, so none waits for one that cannot begin
            futures[job] = pool.submit(execute, job)
        names = {future: job for job, future in futures.items()}
        try:
            for future in as_completed(names):
                failures |= {names[future]: future.result()} if future.result() else {}
                bar.set_postfix_str(label(names[future]))
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()  # it writes a checkpoint
            sys.exit(130)
    return failures


# === Reading them ===

COLUMNS = ("score", "length", "logratio", "ended")


class Result:
    """What a finished run has logged."""

    def __init__(self, folder: Path) -> None:
        self.rows, samples = read_rows(folder / "metrics.jsonl"), {}
        self.evals = {row["step"]: row for row in self.rows if "eval/kl" in row}
        self.steps = sorted(self.evals)
        self.iterations = [row["step"] for row in self.rows if "method/iteration" in row]  # where SPIN's end
        record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        self.args, self.versions = record["args"], record["versions"]
        for row in read_rows(folder / "samples.jsonl"):
            samples.setdefault(row["step"], []).append([row[name] for name in COLUMNS])
        self.samples = {step: np.array(rows, float).T for step, rows in samples.items()}

    def column(self, name: str, step: int | None = None) -> np.ndarray:
        """A value of each prompt's answer, in the last evaluation or that of a step."""
        return self.samples[self.steps[-1] if step is None else step][COLUMNS.index(name)]

    def logged(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def length_controlled_win_rate(wins: np.ndarray, extra_length: np.ndarray) -> float:
    """Win rate if both answers were of the same length.

    Logistic regression of the outcomes (1, 1/2, 0) on an intercept and tanh(d / sd(d)), where d is the answer's length
    less that of the initial policy's answer; its prediction for d = 0. A ridge of 0.001 keeps the weights finite where
    all outcomes are the same.
    """
    x = np.stack([np.ones_like(wins), np.tanh(extra_length / (extra_length.std() or 1.0))], axis=1)
    weights = np.zeros(2)
    for _ in range(50):  # Newton's method
        probs = 1 / (1 + np.exp(-x @ weights))
        hessian = (x.T * (probs * (1 - probs))) @ x + 1e-3 * np.eye(2)
        weights += np.linalg.solve(hessian, x.T @ (wins - probs) - 1e-3 * weights)
    return float(1 / (1 + np.exp(-weights[0])))


METRICS = {  # name: (heading, digits)
    "judge_score": ("judge score", 2),
    "win_rate": ("win rate", 3),
    "lc_win_rate": ("length-controlled win rate", 3),
    "kl": ("KL", 2),
    "response_length": ("tokens a response", 1),
    "eos_rate": ("EOS rate", 3),
    "reward_accuracy": ("reward accuracy", 3),
    "seconds": ("seconds", 0),
    "peak_memory_gb": ("peak memory, GB", 2),
}


def measure(result: Result, step: int | None = None) -> dict[str, float]:
    """A run's values at its end or a step; outcomes are against the initial policy's answers."""
    score, length = (result.column(name, step) - result.column(name, 0) for name in ("score", "length"))
    wins = (score > 0) + 0.5 * (score == 0)
    values = {"judge_score": result.column("score", step).mean(), "win_rate": wins.mean()}
    values |= {"lc_win_rate": length_controlled_win_rate(wins, length), "kl": result.column("logratio", step).mean()}
    values |= {"response_length": result.column("length", step).mean(), "eos_rate": result.column("ended", step).mean()}
    if step is None:
        logged = {"reward_accuracy": "eval/rewards/accuracies", "seconds": "progress/seconds"}
        logged |= {"peak_memory_gb": "perf/peak_memory_gb"}
        values |= {name: result.logged(key)[-1] for name, key in logged.items() if result.logged(key)}
    return {name: float(value) for name, value in values.items()}


def estimate(values: dict[int, Any]) -> dict[str, Any]:
    """Mean over seeds and half its interval; where seeds have a value a prompt, also half that over prompts."""
    means = [float(np.mean(value)) for value in values.values()]
    result = {"mean": statistics.mean(means), "ci95": None, "values": means, "seeds": list(values)}
    if len(means) > 1:
        result["ci95"] = T975[len(means) - 2] * statistics.stdev(means) / math.sqrt(len(means))
    prompts = np.mean(list(values.values()), axis=0)
    if prompts.size > 1:
        result["ci95_prompts"] = float(1.96 * prompts.std(ddof=1) / math.sqrt(prompts.size))
    return result


Curve = list[tuple[float, np.ndarray]]  # points (x, values of the prompts)


def gap(first: Curve, second: Curve, share: float = 0.0) -> np.ndarray | None:
    """How far a curve is above another: the mean difference at five places of the range that both cover, by linear
    interpolation. A share of the range is left out at its low end."""
    curves = [sorted(curve, key=lambda point: point[0]) for curve in (first, second)]
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if low > high:
        return None
    means = []
    for x, values in (zip(*curve, strict=True) for curve in curves):
        places = np.linspace(low + share * (high - low), high, 5)
        means.append(np.array([np.interp(places, x, column).mean() for column in np.transpose(values)]))
    return means[0] - means[1]


# === The claims ===


def less(column: str) -> Callable:
    return lambda a, b: a.column(column) - b.column(column)


def curve_gap(x: str, column: str) -> Callable:
    """How far the curve of three runs is above that of three others."""

    def difference(*results: Result) -> np.ndarray | None:
        points = [(measure(result)[x], result.column(column)) for result in results]
        return gap(points[:3], points[3:])

    return difference


def training_gap(*results: Result) -> np.ndarray | None:
    """How far a run is above another at equal KL in training, in the upper half of what both cover."""
    curves = ([(r.column("logratio", step).mean(), r.column("score", step)) for step in r.steps] for r in results)
    return gap(*curves, share=0.5)


def kl_growth(result: Result) -> np.ndarray:
    """KL at the end less half-way."""
    half = min(result.steps, key=lambda step: abs(step - result.steps[-1] / 2))
    return result.column("logratio") - result.column("logratio", half)


def margin_room(result: Result) -> float:
    """IPO's target 1/(2 beta) less the mean margin h of the last tenth of the training steps."""
    margins, beta = result.logged("train/rewards/margins"), result.args["beta"]
    return 1 / (2 * beta) - statistics.mean(margins[-max(1, len(margins) // 10) :]) / beta


def auc_above_chance(result: Result) -> float | None:
    values = result.logged("method/weight_auc")
    return values[0] - 0.5 if values else None


def gain(t: int) -> Callable:
    """What SPIN's iteration t adds to the judge's scores."""
    return lambda spin: np.subtract(*(spin.column("score", [0, *spin.iterations][k]) for k in (t + 1, t)))


def above_sft(t: int) -> Callable:
    return lambda spin, sft: spin.column("score", spin.iterations[t]) - sft.column("score")


def peak(result: Result) -> int:
    """The step of the best judge score on every other prompt. The rest of them measure the fall from there, since a
    maximum is above what follows by luck alone."""
    return max(result.steps, key=lambda step: result.column("score", step)[::2].mean())


def judge_fall(result: Result) -> np.ndarray:
    return (result.column("score", peak(result)) - result.column("score"))[1::2]


def proxy_gain(result: Result) -> float | None:
    before, after = (result.evals[step].get("eval/reward_model_score") for step in (peak(result), result.steps[-1]))
    return None if before is None or after is None else after - before


CLAIMS = {
    "1": "DPO reaches at least PPO's judge score at equal KL from the same start",
    "2": "On deterministic preferences DPO runs away and IPO does not",
    "3a": "SimPO's answers are no longer than DPO's at equal win rate",
    "3b": "Without the length average SimPO's answers grow",
    "4a": "Pre-DPO is above the method of its guide",
    "4b": "Pre-DPO is above DPO of the same cost, and above DPO of the same optimum",
    "4c": "Pre-DPO is above DPO at equal KL",
    "4d": "Pre-DPO's weights find flipped labels",
    "5a": "SPIN is above further SFT of as many steps",
    "5b": "SPIN improves in each of its first two iterations",
    "5c": "SPIN saturates",
    "6a": "Online is above offline at equal KL",
    "6b": "The annotator's instruction controls the length",
    "7": "PPO without a KL penalty over-optimises its reward model: proxy up, judge down",
}
SCORE, LENGTH, KL = less("score"), less("length"), less("logratio")
FRONTIER, LENGTHS = curve_gap("kl", "score"), curve_gap("win_rate", "length")
COMPARISONS = [  # claim, what, runs (with *: those of the curve), difference of their results, what it is to be above
    ("1", "judge score: DPO less PPO, at five KLs on both curves", "dpo* rlhf_ppo*", FRONTIER, -0.05),
    ("2", "KL of DPO: after 5 epochs less half-way", "dpo_sign", kl_growth, 0),
    ("2", "the same: DPO less IPO", "dpo_sign ipo_sign", lambda a, b: kl_growth(a) - kl_growth(b), 0),
    ("2", "KL after 5 epochs: DPO less IPO", "dpo_sign ipo_sign", KL, 0),
    ("2", "IPO: 1/(2 beta) less the margin of training pairs at the end, nats", "ipo_sign", margin_room, -1),
    ("3a", "tokens: DPO less SimPO, at five win rates on both curves", "dpo* simpo*", LENGTHS, -1),
    ("3b", "tokens: SimPO with sums less SimPO", "simpo_sum simpo", LENGTH, 0),
    ("4a", "judge score: Pre-DPO less DPO", "pre_dpo dpo", SCORE, 0),
    ("4a", "judge score: Pre-DPO, guide SimPO, less SimPO", "pre_dpo_simpo simpo", SCORE, 0),
    ("4b", "judge score: Pre-DPO less DPO, 2 epochs", "pre_dpo dpo_2_epochs", SCORE, 0),
    ("4b", "judge score: Pre-DPO less DPO, beta 0.05", "pre_dpo dpo_beta_eff", SCORE, 0),
    ("4c", "judge score: Pre-DPO less DPO, at five KLs on both curves", "pre_dpo* dpo*", FRONTIER, 0),
    ("4d", "AUC of true against flipped labels less 0.5: guide DPO", "pre_dpo", auc_above_chance, 0),
    ("4d", "AUC of true against flipped labels less 0.5: guide SimPO", "pre_dpo_simpo", auc_above_chance, 0),
    *(
        ("5a", f"judge score: SPIN, iteration {t}, less SFT of {steps} steps", f"spin sft_{steps}", above_sft(t), 0)
        for t, steps in enumerate(SFT_STEPS)
    ),
    *(("5b", f"judge score of SPIN: after iteration {t} less before it", "spin", gain(t), 0) for t in range(2)),
    ("5c", "judge score of SPIN: first iteration's gain less the last's", "spin", lambda a: gain(0)(a) - gain(2)(a), 0),
    ("6a", "judge score, DPO loss: online less offline, at five KLs", "online_dpo offline_dpo", training_gap, 0),
    ("6a", "judge score, IPO loss: online less offline, at five KLs", "online_ipo offline_ipo", training_gap, 0),
    ("6a", "the same with beta 0.05", "online_ipo_beta_0.05 offline_ipo_beta_0.05", training_gap, 0),
    ("6a", "judge score, SLiC loss: online less offline, at five KLs", "online_slic offline_slic", training_gap, 0),
    ("6b", 'tokens: told "more positive" less told "shorter"', "oaif oaif_shorter", LENGTH, 0),
    ("7", "reward model's score: at the end less at the judge's peak", "ppo_no_kl", proxy_gain, 0),
    ("7", "judge score: at its peak less at the end", "ppo_no_kl", judge_fall, 0),
]
# Pre-DPO's effects are small; the others are claims that three seeds had left open (5a, too, but it takes long).
MORE_SEEDS = ("1", "4a", "4b", "4c", "4d", "6a", "7")


def seeds_of(args: Args, claim: str) -> range:
    return range(1, 1 + (args.more_seeds if claim in MORE_SEEDS else args.seeds))


def names_of(runs: str) -> list[str]:
    """The runs of a comparison."""
    return sum((CURVE_RUNS[name[:-1]] if name.endswith("*") else [name] for name in runs.split()), [])


def compare(results: dict[int, list[Result | None]], difference: Callable, above: float) -> dict[str, Any]:
    """A comparison of runs, by seed, and its verdict."""
    values = {seed: difference(*some) for seed, some in results.items() if None not in some}
    known = {seed: value for seed, value in values.items() if value is not None}
    record = {"above": above, "undefined": sorted(set(values) - set(known))} | (estimate(known) if known else {})
    verdict = OPEN if values else MISSING
    if record.get("ci95") is not None:
        low, high = (record["mean"] + sign * record["ci95"] for sign in (-1, 1))
        verdict = HOLDS if low > above else FAILS if high <= above else OPEN
    return record | {"verdict": verdict}


def examine(book: dict[Job, Result], args: Args) -> list[dict[str, Any]]:
    """The claims, their comparisons and the verdicts."""
    claims = {number: {"number": number, "claim": text, "comparisons": []} for number, text in CLAIMS.items()}
    for number, text, runs, difference, above in COMPARISONS:
        names = names_of(runs)
        results = {seed: [book.get((name, seed)) for name in names] for seed in seeds_of(args, number)}
        claims[number]["comparisons"].append({"text": text, "runs": names} | compare(results, difference, above))
    for record in claims.values():
        verdicts = [comparison["verdict"] for comparison in record["comparisons"]]
        record["verdict"] = next(verdict for verdict in (FAILS, MISSING, OPEN, HOLDS) if verdict in verdicts)
    return list(claims.values())


# === The report ===


@cache
def code(text: str) -> str:
    """A script without docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def load(args: Args) -> tuple[dict[Job, Result], list[str]]:
    """The finished runs, and what speaks against some; those with other flags than now are left out."""
    book, remarks, outdated = {}, [], {}
    for job in (job for job in plan(args) if job[0] != "annotate" and done(args, job)):
        folder, log = args.runs_dir / label(job), args.runs_dir / "logs" / f"{label(job)}.txt"
        script = RUNS[job[0]].split()[0]
        if log.exists() and log.read_text(encoding="utf-8").split("\n")[0] != shown(args, job):
            remarks.append(f"{label(job)} was run with other flags and is left out: delete its folder to run it again")
            continue
        copy = folder / f"{script}.py"
        if copy.exists() and code(copy.read_text(encoding="utf-8")) != code(script_text(script)):
            outdated.setdefault(script, []).append(label(job))
        book[job] = Result(folder)
    remarks += [f"With another version of {script}.py: {', '.join(names)}" for script, names in outdated.items()]
    return book, remarks


def way(result: Result, steps: list[int]) -> list[dict[str, float]]:
    """A run's evaluations at some steps. The margin is that of the test pairs in nats."""
    names, points = ("kl", "judge_score", "reward_model_score", "win_rate", "response_length"), []
    for row in (result.evals[step] for step in steps):
        points.append({"step": row["step"]} | {name: row[f"eval/{name}"] for name in names if f"eval/{name}" in row})
        if isinstance(result.args.get("beta"), float):
            points[-1]["margin"] = row["eval/rewards/margins"] / result.args["beta"]
    return points


def aggregate(args: Args) -> dict[str, Any]:
    """All numbers of the report."""
    book, remarks = load(args)
    seeds, names = range(1, args.seeds + 1), [name for name in RUNS if name != "annotate"]
    versions = {name: sorted({r.versions[name] for r in book.values()}) for name in ("torch", "transformers")}
    results = {"versions": versions, "cores": os.cpu_count(), "runs_at_a_time": args.jobs, "seeds": list(seeds)}
    results |= {"num_eval_prompts": args.num_eval_prompts, "runs": {}, "paths": {}, "claims": examine(book, args)}
    any_run = {seed: result for (_, seed), result in book.items() if seed in seeds}  # all start from the same policy
    measured = {"initial policy": {seed: measure(result, 0) for seed, result in sorted(any_run.items())}}
    measured |= {name: {seed: measure(book[name, seed]) for seed in seeds if (name, seed) in book} for name in names}
    for name, by_seed in measured.items():
        run = results["runs"][name] = {"seeds": list(by_seed)}
        run |= {"command": shown(args, (name, 1))} if name in RUNS else {}
        for metric in METRICS:
            values = {seed: values[metric] for seed, values in by_seed.items() if metric in values}
            run |= {metric: estimate(values)} if values else {}
        pairs = {seed: (book.get((name, seed)), book.get(("dpo", seed))) for seed in by_seed if name != "dpo"}
        gaps = {seed: SCORE(*pair) for seed, pair in pairs.items() if None not in pair}
        run |= {"judge_score_less_dpo": estimate(gaps)} if gaps else {}
    for name in ("dpo_sign", "ipo_sign", "spin", "ppo_no_kl"):
        here = [book[name, seed] for seed in seeds if (name, seed) in book]
        ways = [way(result, [0, *result.iterations] if name == "spin" else result.steps) for result in here]
        points = zip(*ways, strict=False)
        results["paths"][name] = [{key: statistics.mean(p[key] for p in some) for key in some[0]} for some in points]
    results["missing"] = [label(job) for job in plan(args) if job[0] != "annotate" and job not in book]
    text = json.dumps(results | {"remarks": remarks})
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))


def number(value: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value['mean']:{sign}.{digits}f}" + ("" if value["ci95"] is None else f" ± {value['ci95']:.{digits}f}")


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *rows))


def runs_table(results: dict[str, Any], names: list[str]) -> str:
    """The runs' values; (n) after a name is the number of seeds where it is not all of them."""
    rows = []
    for name, run in ((name, results["runs"][name]) for name in names if results["runs"][name]["seeds"]):
        mark = f" ({len(run['seeds'])})" if len(run["seeds"]) < len(results["seeds"]) else ""
        cells = [number(run.get(metric), digits) for metric, (_, digits) in METRICS.items()]
        rows.append([f"{name}{mark}", cells[0], number(run.get("judge_score_less_dpo"), 2, "+"), *cells[1:]])
    heads = [heading for heading, _ in METRICS.values()]
    return table(["run", heads[0], "less DPO's", *heads[1:]], rows)


REPORT = """\
# Results

Written by `compare.py`, whose docstring has the rules; not to be edited. {versions}; {cores} cores, {jobs} runs at a
time with one thread each; seeds 1 to {seeds}, {prompts:,} test prompts. Means over seeds ± half the 95 % interval. Win
rates are against the initial policy, KL is to it, in nats a response. Differences from DPO's judge score are paired.
Reward accuracy is that of a method's own reward: Pre-DPO's is relative to its guide, SPIN's is about own answers.
Seconds are of training and evaluation, without the references' log-probabilities and the answers in SPIN's pairs.

## Defaults

{defaults}
## Strengths

Bars span the seeds.

![judge score against KL](frontier.svg)

![reward accuracy and response length against KL](lengths.svg)

{strengths}
## Runs for the claims

{others}
## Claims

{claims}
What decides, by differences within a seed (number of seeds):

{comparisons}
{paths}
Missing: {missing}.
{remarks}"""


def report(results: dict[str, Any]) -> str:
    """results.md, from the content of results.json alone."""
    rows, paths = [], ""
    for claim, check in ((record, check) for record in results["claims"] for check in record["comparisons"]):
        mean = f"{number(check, 3, '+')} ({len(check['seeds'])})" if "mean" in check else "-"
        prompts = f"± {check['ci95_prompts']:.3f}" if "ci95_prompts" in check else "-"
        why = f" (undefined for seeds {check['undefined']})" if check["undefined"] else ""
        rows.append([claim["number"], check["text"], mean, prompts, f"{check['above']:g}", check["verdict"] + why])
    for name, points in ((name, points) for name, points in results["paths"].items() if points):
        keys = [key for key in points[-1] if key != "step"]
        heads = [METRICS[key][0] if key in METRICS else key.replace("_", " ") for key in keys]
        cells = [[f"{row['step']:.0f}", *(f"{row[key]:.2f}" if key in row else "-" for key in keys)] for row in points]
        paths += f"`{name}` on its way (margin: of test pairs, in nats):\n\n{table(['step', *heads], cells)}\n"
    others = [name for some in CLAIM_RUNS.values() for name in some if name in results["runs"]]
    claims = [[f"{claim['number']}. {claim['claim']}", f"**{claim['verdict']}**"] for claim in results["claims"]]
    heads = ["claim", "comparison", "difference, over seeds", "over prompts", "is to be above", "verdict"]
    return REPORT.format(
        versions=", ".join(f"{name} {' and '.join(some)}" for name, some in results["versions"].items()),
        **{"cores": results["cores"], "jobs": results["runs_at_a_time"], "prompts": results["num_eval_prompts"]},
        seeds=results["seeds"][-1],
        defaults=runs_table(results, ["initial policy", *METHODS]),
        strengths=runs_table(results, list(STRENGTHS)),
        others=runs_table(results, others),
        claims=table(["claim", "verdict"], claims),
        comparisons=table(heads, rows),
        paths=paths,
        missing=", ".join(results["missing"]) or "nothing",
        remarks="".join(f"\n{text}.\n" for text in results["remarks"]),
    )


def draw(results: dict[str, Any], folder: Path) -> None:
    """The figures, with means over the seeds and bars for their range; the same numbers give the same SVG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams.update({"svg.hashsalt": "compare", "axes.grid": True, "grid.alpha": 0.3})
    for name, metrics in {"frontier": ["judge_score"], "lengths": ["reward_accuracy", "response_length"]}.items():
        figure, axes = pyplot.subplots(1, len(metrics), figsize=(4 + 4 * len(metrics), 5), layout="constrained")
        for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
            for k, (method, names) in enumerate(CURVE_RUNS.items()):
                runs = [results["runs"][run] for run in names if metric in results["runs"][run]]
                points = [[run[key] for run in runs] for key in ("kl", metric)]
                x, y = ([point["mean"] for point in some] for some in points)
                dx, dy = (
                    [[p["mean"] - min(p["values"]) for p in some], [max(p["values"]) - p["mean"] for p in some]]
                    for some in points
                )
                flag, values = CURVES[method]
                text = f"{METHODS[method]} ({flag.split('--')[-1]} {', '.join(map(str, values))})"
                style = {"color": f"C{k}", "marker": "osD^vPX"[k], "capsize": 2, "elinewidth": 0.8}
                if runs:
                    axis.errorbar(x, y, dy, dx, label=text, **style)
            if metric in results["runs"]["initial policy"]:
                level = results["runs"]["initial policy"][metric]["mean"]
                axis.axhline(level, color="grey", linestyle=":", label="initial policy")
            axis.set(xscale="log", xlabel="KL to the initial policy, nats a response", ylabel=METRICS[metric][0])
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right" if name == "frontier" else "best")
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            figure.savefig(folder / f"{name}.{suffix}", metadata=metadata, dpi=150)
        pyplot.close(figure)


def main(args: Args) -> None:
    if args.quick:
        args.seeds = args.more_seeds = 1
    if not 1 <= args.seeds <= args.more_seeds <= 10:
        sys.exit("error: 1 <= --seeds <= --more-seeds <= 10, please")
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: the figures need matplotlib: pip install -r benchmarks/requirements.txt")
    args.runs_dir, failures = args.runs_dir.absolute(), {}
    folder = args.out_dir or (Path(__file__).resolve().parent if args.max_steps < 0 else args.runs_dir)
    if not args.report:
        chosen = {job for job in plan(args) if re.search(args.only, label(job))}
        chosen |= set(map(needs, chosen))
        todo = [job for job in plan(args) if job in chosen and not done(args, job)]
        print(f"{len(chosen)} runs, of which {len(chosen) - len(todo)} are finished")
        prepare(args, todo)
        failures = run_all(args, todo)
    results = aggregate(args)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(report(results), encoding="utf-8")
    draw(results, folder)
    for record in results["claims"]:
        print(f"{record['number']}. {record['claim']}: {record['verdict']}")
    print(f"{len(results['missing'])} runs are missing; the report is in {folder}")
    for job, text in failures.items():
        print(f"\nfailed: {label(job)}: {text}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
