"""Runs the methods on sentiment/pairs and draws how much reward each gets for how much KL to the initial model.

    python benchmarks/sentiment/frontier.py                 # every run that results.json lacks, one by one
    python benchmarks/sentiment/frontier.py --only 'dpo.py' # of these, those whose command has this expression
    python benchmarks/sentiment/frontier.py --report        # no run, only the table in README.md and frontier.png

A run is a script in a process of its own with one thread. results.json has its numbers under its command, without the
model, as soon as it is over; the next call goes on from there. `plan` has all runs in their order.
"""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import make_data
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")  # it draws without a screen
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT, RESULTS, RUNS = HERE.parent.parent, HERE / "results.json", "runs/sentiment"
REWARD, PAIRS = "benchmarks/sentiment/reward.py", "benchmarks/sentiment/pairs"
SEEDS = (1, 2)
COMMON = "--lora-rank 16 --dtype bfloat16 --num-eval-prompts 64 --eval-steps 1000 --max-new-tokens 48 --max-length 128"
COMMON += f" --judge-name-or-path {REWARD}"
RATE = "--learning-rate 0.0005"
STEPS = "--max-steps 16 --batch-size 16"
HALVES = f"{RATE} --guide-learning-rate 0.0005 --guide-beta 0.1 --max-steps 8 --batch-size 16"  # of both stages
SPIN = f"{RATE} --num-iterations 2 --prompts-per-iteration 128 --max-steps 8 --batch-size 16"  # of each iteration
RATES = (0.0005, 0.0002, 0.001)  # in so few steps it is the rate, and not the price of a nat, that limits the KL
GRPO = "--max-steps 16 --batch-size 32"
PPO = "--sft-epochs 0 --max-steps 8 --rollouts-per-step 24 --ppo-epochs 2 --gae-lambda 1 --value-clip-range 10"
TRUE = f"--reward-name-or-path {REWARD} --missing-eos-score 0.3"  # an answer that is cut off counts as an average one
LEARNED = "--reward-learning-rate 0.0005 --batch-size 32 --missing-eos-score 0"  # of the pairs that DPO sees


@dataclass
class Args:
    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    only: str = ""  # regular expression: run only the commands in which it is found
    jobs: int = 1  # runs at a time
    report: bool = False  # only write the report


@dataclass(frozen=True)
class Method:
    title: str
    script: str  # with flags that stay the same
    strength: str  # flag of the strength
    values: tuple[float, ...]  # of it, the default first
    data: str = PAIRS


METHODS = {
    "dpo": Method("DPO", f"dpo.py {RATE} {STEPS}", "--beta", (0.1, 0.3, 1)),
    "ipo": Method("IPO", f"ipo.py {RATE} {STEPS}", "--beta", (0.1, 0.03, 0.3)),
    "simpo": Method(
        "SimPO", f"simpo.py {STEPS}", "--learning-rate", (0.0005, 0.0002, 0.0001)
    ),  # has no pull to a reference
    "kto": Method("KTO", f"kto.py {RATE} --max-steps 16 --batch-size 32", "--beta", (0.1, 0.3, 1), f"{RUNS}/thumbs"),
    "pre_dpo": Method("Pre-DPO", f"pre_dpo.py {HALVES}", "--beta", (0.1, 0.3, 1)),
    "spin": Method("SPIN", f"spin.py {SPIN}", "--beta", (1, 0.3, 3)),
    "oaif": Method("OAIF", f"oaif.py {RATE} {STEPS} --annotator-name-or-path {REWARD}", "--beta", (0.1, 0.3, 1)),
    "grpo": Method("GRPO", f"grpo.py {GRPO} --reward-name-or-path {REWARD}", "--learning-rate", RATES),
    # In units of the true reward, beta 0.1 of pairs drawn at SCALE 4 is a price of 0.1 / 4 for a nat.
    "ppo_true": Method("PPO, true reward", f"rlhf_ppo.py {PPO} {TRUE} --kl-coef 0.025", "--learning-rate", RATES),
    "ppo_learned": Method(
        "PPO, learned reward", f"rlhf_ppo.py {PPO} {LEARNED} --kl-coef 0.1", "--learning-rate", RATES
    ),
}
NOISE = {}
for percent in make_data.FLIPPED:
    script, data = f"dpo.py {RATE} {STEPS}", f"{RUNS}/flipped-{percent}"
    NOISE[f"dpo_{percent}"] = Method(f"DPO, {percent} % flipped", script, "--beta", (0.1,), data)
    if percent > 0:
        script += f" --label-smoothing {percent / 100:g}"
        NOISE[f"cdpo_{percent}"] = Method(f"conservative DPO, {percent} % flipped", script, "--beta", (0.1,), data)


def command(name: str, seed: int, strength: float | None = None) -> str:
    """A run with a strength, or else with the default one."""
    method = (METHODS | NOISE)[name]
    strength = method.values[0] if strength is None else strength
    return f"python {method.script} {method.strength} {strength:g} --dataset-name {method.data} {COMMON} --seed {seed}"


def plan() -> list[str]:
    """All runs: default strengths, then noisy labels, then other strengths; of each, the first seed comes first."""
    planned = [command(name, seed) for seed in SEEDS for name in METHODS]
    planned += [command(name, seed) for seed in SEEDS for name in NOISE]
    for seed in SEEDS:
        for name, method in METHODS.items():
            planned += [command(name, seed, strength) for strength in method.values[1:]]
    return planned


# === Running ===


def execute(words: str, model: str) -> dict:
    """Make a run, and read its numbers."""
    folder = ROOT / RUNS / f"run-{time.time_ns()}"
    log, flags = folder.with_suffix(".txt"), ["--model-name-or-path", model, "--output-dir", str(folder)]
    with log.open("w") as stream:
        options = {"stdout": stream, "stderr": subprocess.STDOUT, "cwd": ROOT}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen([sys.executable, *shlex.split(words)[1:], *flags], env=environment, **options)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{words}\nfailed:\n{log.read_text()[-2000:]}")
    record = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime), "evals": []}
    for row in [json.loads(line) for line in (folder / "metrics.jsonl").open()]:
        numbers = {key.removeprefix("eval/"): float(f"{row[key]:.6g}") for key in row if key.startswith("eval/")}
        record["evals"] += [{"step": row["step"]} | numbers] if numbers else []
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    record["response"] = [row["response"] for row in samples if row["step"] == samples[-1]["step"]][0]
    shutil.rmtree(folder)
    log.unlink()
    return record


def run_all(runs: dict, todo: list[str], args: Args) -> None:
    """Make runs, and store each as soon as it is over."""
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = {pool.submit(execute, words, args.model_name_or_path): words for words in todo}
        try:
            for number, task in enumerate(as_completed(tasks), start=1):
                runs[tasks[task]] = task.result()
                unfinished = RESULTS.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(runs, indent=0) + "\n")
                unfinished.rename(RESULTS)
                print(f"{number}/{len(todo)} {runs[tasks[task]]['cpu_seconds']} s: {tasks[task]}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# === The report ===


@dataclass(frozen=True)
class Question:
    text: str  # the claim, as a difference that is positive where it holds
    commands: Callable[[int], list[str]]  # of a seed
    difference: Callable  # of the records of these runs
    least: float = 0.1  # that the mean over the seeds must have


def final(record: dict, metric: str = "judge_score") -> float:
    return record["evals"][-1][metric]


def less(first: dict, second: dict) -> float:
    return final(first) - final(second)


def shorter(first: dict, second: dict) -> float:
    return final(second, "response_length") - final(first, "response_length")


def above_dpo(*records: dict) -> float:
    """Reward of the runs after the first three, above the line from the initial model through these, DPO's; a mean."""
    dpo, runs = records[:3], records[3:]
    points = sorted([(0.0, dpo[0]["evals"][0]["judge_score"])] + [(final(row, "kl"), final(row)) for row in dpo])
    kls, rewards = zip(*points, strict=True)
    return statistics.fmean([final(run) - float(np.interp(final(run, "kl"), kls, rewards)) for run in runs])


def below_dpo(*records: dict) -> float:
    return -above_dpo(*records)


def pair(first: str, second: str) -> Callable[[int], list[str]]:
    return lambda seed: [command(first, seed), command(second, seed)]


def beside_dpo(name: str) -> Callable[[int], list[str]]:
    return lambda seed: [command(which, seed, value) for which in ("dpo", name) for value in METHODS[which].values]


QUESTIONS = [
    Question("DPO's frontier is above PPO with the learned reward", beside_dpo("ppo_learned"), below_dpo),
    Question("DPO's frontier is above PPO with the true reward", beside_dpo("ppo_true"), below_dpo),
    Question("OAIF has more reward than DPO on pairs without noise", pair("oaif", "dpo_0"), less),
    Question("Pre-DPO is above DPO's frontier", beside_dpo("pre_dpo"), above_dpo),
    Question("SimPO's answers are shorter than DPO's (tokens)", pair("simpo", "dpo"), shorter, least=2),
    Question("IPO is above DPO's frontier", beside_dpo("ipo"), above_dpo),
    Question("GRPO has more reward than PPO with the true reward", pair("grpo", "ppo_true"), less),
    Question("10 % flipped: conservative DPO has more reward than DPO", pair("cdpo_10", "dpo_10"), less),
    Question("30 % flipped: conservative DPO has more reward than DPO", pair("cdpo_30", "dpo_30"), less),
]


TABLES = """
{}
A value for each seed:

{}
What a policy of the first seed answers to the first test prompt:

{}
![true reward against KL to the initial model, a colour for each method](frontier.png)
"""


def verdict(values: list[float], least: float) -> str:
    if max(values) < 0 or min(values) > 0:
        mean = statistics.fmean(values)
        return "holds" if mean > least else "does not hold" if mean < -least else "open"
    return "open"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *rows])


def write_tables(runs: dict) -> str:
    """Verdicts, numbers, and an answer of each method, as far as there are runs; a value for each seed."""
    verdicts, numbers, answers = [], [], []
    for question in QUESTIONS:
        values = []
        for words in [question.commands(seed) for seed in SEEDS]:
            values += [question.difference(*[runs[word] for word in words])] if set(words) <= set(runs) else []
        shown = [f"{value:+.2f}" for value in values] + ["missing"] * (len(SEEDS) - len(values))
        said = verdict(values, question.least) if len(values) == len(SEEDS) else "missing"
        verdicts.append([question.text, *shown, f"**{said}**"])
    for name, method in (METHODS | NOISE).items():
        for value in sorted(method.values):
            records = [runs.get(command(name, seed, value)) for seed in SEEDS]
            cells = [method.title, f"{method.strength.removeprefix('--')} {value:g}"]
            for metric, digits in {"judge_score": 2, "kl": 1, "response_length": 1, "eos_rate": 2}.items():
                cells.append(", ".join([f"{final(row, metric):.{digits}f}" if row else "missing" for row in records]))
            numbers.append([*cells, ", ".join([str(row["cpu_seconds"]) if row else "missing" for row in records])])
        if command(name, SEEDS[0]) in runs:
            answers.append(f"- {method.title}: {' '.join(runs[command(name, SEEDS[0])]['response'].split())}\n")
    seeds = [f"seed {seed}" for seed in SEEDS]
    heads = ["method", "strength", "true reward", "KL", "tokens", "ended", "CPU seconds"]
    return TABLES.format(table(["claim", *seeds, "verdict"], verdicts), table(heads, numbers), "".join(answers))


def draw(runs: dict) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, method) in enumerate(METHODS.items()):
        line = []
        for value in method.values:
            records = [runs[words] for words in [command(name, seed, value) for seed in SEEDS] if words in runs]
            points = [(final(row, "kl"), final(row)) for row in records]
            axes.plot(*np.array(points).reshape(-1, 2).T, ".", color=f"C{number}", alpha=0.5)
            line += [np.mean(points, axis=0)] if points else []
        if line:
            values = ", ".join([f"{value:g}" for value in sorted(method.values)])
            label = f"{method.title} ({method.strength.removeprefix('--')} {values})"
            axes.plot(*np.array(sorted(line, key=lambda point: point[0])).T, "o-", color=f"C{number}", label=label)
    rewards = [record["evals"][0]["judge_score"] for record in runs.values()]
    axes.plot(0, statistics.fmean(rewards), "k*", markersize=12, label="initial model")
    axes.set(xlabel="KL to the initial model (nats a response)", ylabel="true reward: VADER's compound score, -1 to 1")
    axes.set_title(
        "Controlled sentiment with SmolLM2-135M-Instruct: reward for KL\nsmall dots: runs of one seed, a mean of "
        "64 answers each; circles: means over seeds",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(HERE / "frontier.png", dpi=120, metadata={"Software": None})


def main(args: Args) -> None:
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    make_data.derive(make_data.DERIVED)
    todo = [words for words in plan() if words not in runs and re.search(args.only, words)]
    if not args.report:
        run_all(runs, todo, args)
    page = (HERE / "README.md").read_text()
    (HERE / "README.md").write_text(page.split("## Results\n")[0] + "## Results\n" + write_tables(runs))
    draw(runs)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
