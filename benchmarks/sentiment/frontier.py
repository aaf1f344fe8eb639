"""Runs the methods on sentiment/pairs and draws how much reward each gets for how much KL to the initial model.

    python benchmarks/sentiment/frontier.py                 # every run that results.json lacks, one by one
    python benchmarks/sentiment/frontier.py --only 'dpo.py' # only those whose command matches this expression
    python benchmarks/sentiment/frontier.py --report        # no run, only the table in README.md and frontier.png

Each run is a script in its own process with one thread. Its numbers are stored in results.json under its command,
without the model, as soon as it is over; the next call goes on from there. Two calls at once would overwrite numbers.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
COMMON = "--learning-rate 0.0005 --lora-rank 16 --dtype bfloat16 --num-eval-prompts 64 --max-new-tokens 48"
COMMON += f" --max-length 128 --judge-name-or-path {REWARD}"
STEPS_16 = "--max-steps 16 --batch-size 16 --eval-steps 6"  # so evaluated after 6, 12 and 16 steps
TWICE_8 = "--max-steps 8 --batch-size 16 --eval-steps 4"  # of each stage
# A nat costs 0.1 in units of DPO's reward, whose pairs were drawn at SCALE 4: that is 0.1 / 4 in units of the true
# reward, and 0.067 in units of its standard deviation among the answers to a prompt, 0.375, by which GRPO divides.
GRPO = "--max-steps 12 --batch-size 32 --eval-steps 4 --mask-truncated-completions --beta 0.067"
PPO = "--max-steps 8 --rollouts-per-step 24 --eval-steps 3 --sft-epochs 0 --ppo-epochs 2"
PPO += " --gae-lambda 1 --value-clip-range 10"  # so that a new value model learns fast
TRUE = f"--kl-coef 0.025 --reward-name-or-path {REWARD} --missing-eos-score 0.3"  # a cut answer counts as average
LEARNED = "--kl-coef 0.1 --reward-learning-rate 0.0005 --batch-size 32 --missing-eos-score 0"  # of the pairs DPO sees


@dataclass
class Args:
    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    only: str = ""  # regular expression: run only the commands in which it is found
    jobs: int = 1  # runs at a time
    report: bool = False  # only write the report


@dataclass(frozen=True)
class Method:
    title: str
    script: str  # with its flags
    data: str = PAIRS
    first_step: int = 1  # evaluations before this step are not counted


METHODS = {
    "dpo": Method("DPO", f"dpo.py --beta 0.1 {STEPS_16}"),
    "ipo": Method("IPO", f"ipo.py --beta 0.1 {STEPS_16}"),
    "simpo": Method("SimPO", f"simpo.py {STEPS_16}"),
    "kto": Method("KTO", "kto.py --beta 0.1 --max-steps 16 --batch-size 32 --eval-steps 6", f"{RUNS}/thumbs"),
    "pre_dpo": Method(
        "Pre-DPO", f"pre_dpo.py --beta 0.1 --guide-beta 0.1 --guide-learning-rate 0.0005 {TWICE_8}", first_step=9
    ),
    "spin": Method("SPIN", f"spin.py --beta 1 --num-iterations 2 --prompts-per-iteration 128 {TWICE_8}"),
    "oaif": Method("OAIF", f"oaif.py --beta 0.1 {STEPS_16} --annotator-name-or-path {REWARD}"),
    "grpo": Method("GRPO", f"grpo.py {GRPO} --reward-name-or-path {REWARD}"),
    "ppo_true": Method("PPO, true reward", f"rlhf_ppo.py {PPO} {TRUE}"),
    # Stage 2 has 8 steps. Without the evaluation after PPO's first, three are left, as with the true reward.
    "ppo_learned": Method("PPO, learned reward", f"rlhf_ppo.py {PPO} {LEARNED}", first_step=10),
}
NOISE = {}
for percent in make_data.FLIPPED:
    script, data = "dpo.py --beta 0.1 --max-steps 16 --batch-size 16 --eval-steps 1000", f"{RUNS}/flipped-{percent}"
    NOISE[f"dpo_{percent}"] = Method(f"DPO, {percent} % flipped", script, data)
    if percent > 0:
        script += f" --label-smoothing {percent / 100:g}"
        NOISE[f"cdpo_{percent}"] = Method(f"conservative DPO, {percent} % flipped", script, data)


def command(name: str, seed: int) -> str:
    method = (METHODS | NOISE)[name]
    return f"python {method.script} --dataset-name {method.data} {COMMON} --seed {seed}"


def plan() -> list[str]:
    """All runs, those of the first seed first; the ones that the questions need least come last."""
    planned = [command(name, seed) for methods in (METHODS, NOISE) for seed in SEEDS for name in methods]
    late = [command("spin", SEEDS[1])] + [command(name, seed) for seed in SEEDS for name in ("dpo_10", "cdpo_10")]
    return [words for words in planned if words not in late] + late


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
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    for row in [json.loads(line) for line in (folder / "metrics.jsonl").open()]:
        if "eval/kl" in row:
            numbers = {key.removeprefix("eval/"): float(f"{row[key]:.6g}") for key in row if key.startswith("eval/")}
            answers = [sample for sample in samples if sample["step"] == row["step"]]
            numbers |= {
                f"each_{name}": [answer[name] for answer in answers] for name in ("judge_score", "response_length")
            }
            record["evals"].append({"step": row["step"]} | numbers)
    record["response"] = answers[0]["response"]
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
    difference: Callable  # of the records of these runs: an array with a value for each test prompt


def final(record: dict, metric: str = "judge_score") -> float:
    return record["evals"][-1][metric]


def lead(first: dict, second: dict) -> np.ndarray:
    return np.subtract(final(first, "each_judge_score"), final(second, "each_judge_score"))


def above(line: dict, run: dict, metric: str = "judge_score", first_step: int = 1) -> np.ndarray:
    """How far a run is above the course of another, the line from the initial model through its evaluations.

    The line has a value for each KL, and is level beyond its end. The result is the run's mean distance from it, over
    the run's own evaluations."""
    points = sorted(line["evals"], key=lambda point: point["kl"])
    kls, heights = [point["kl"] for point in points], np.array([point[f"each_{metric}"] for point in points])
    differences = []
    for point in [point for point in run["evals"] if point["step"] >= first_step]:
        at_its_kl = [np.interp(point["kl"], kls, of_prompt) for of_prompt in heights.T]
        differences.append(np.subtract(point[f"each_{metric}"], at_its_kl))
    return np.mean(differences, axis=0)


def below(*records: dict, **options: Any) -> np.ndarray:
    return -above(*records, **options)


def pair(first: str, second: str) -> Callable[[int], list[str]]:
    return lambda seed: [command(first, seed), command(second, seed)]


fewer_tokens = partial(below, metric="response_length")
above_in_stage_2 = partial(above, first_step=METHODS["pre_dpo"].first_step)
below_in_stage_3 = partial(below, first_step=METHODS["ppo_learned"].first_step)
QUESTIONS = [
    Question("DPO's frontier is above PPO with the learned reward", pair("dpo", "ppo_learned"), below_in_stage_3),
    Question("DPO's frontier is above PPO with the true reward", pair("dpo", "ppo_true"), below),
    Question("OAIF has more reward than DPO on pairs without noise", pair("oaif", "dpo_0"), lead),
    Question("Pre-DPO is above DPO's frontier", pair("dpo", "pre_dpo"), above_in_stage_2),
    Question("SimPO's answers are shorter than DPO's (tokens)", pair("dpo", "simpo"), fewer_tokens),
    Question("IPO is above DPO's frontier", pair("dpo", "ipo"), above),
    Question("GRPO is above PPO's frontier, both with the true reward", pair("ppo_true", "grpo"), above),
    Question("10 % flipped: conservative DPO has more reward than DPO", pair("cdpo_10", "dpo_10"), lead),
    Question("30 % flipped: conservative DPO has more reward than DPO", pair("cdpo_30", "dpo_30"), lead),
]


TABLES = """
{}
A mean for each seed; of both, with half its 95 % interval over the prompts:

{}
What a policy of the first seed answers to the first test prompt:

{}
![true reward against KL to the initial model, a colour for each method](frontier.png)
"""


def interval(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean."""
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def verdict(differences: list[np.ndarray]) -> str:
    """Not open if the seeds' mean differences have one sign, and the interval over the prompts excludes 0."""
    means, together = [values.mean() for values in differences], np.mean(differences, axis=0)
    if abs(together.mean()) <= interval(together) or min(means) < 0 < max(means):
        return "open"
    return "holds" if together.mean() > 0 else "does not hold"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *rows])


def write_tables(runs: dict) -> str:
    """Verdicts, numbers, and an answer of each method, as far as there are runs."""
    verdicts, numbers, answers = [], [], []
    for question in QUESTIONS:
        differences = []
        for words in [question.commands(seed) for seed in SEEDS]:
            differences += [question.difference(*[runs[word] for word in words])] if set(words) <= set(runs) else []
        shown = [f"{values.mean():+.2f}" for values in differences] + ["missing"] * (len(SEEDS) - len(differences))
        if len(differences) == len(SEEDS):
            together = np.mean(differences, axis=0)
            shown += [f"{together.mean():+.2f} ± {interval(together):.2f}", f"**{verdict(differences)}**"]
        else:
            shown += ["missing", "missing"]
        verdicts.append([question.text, *shown])
    for name, method in (METHODS | NOISE).items():
        records = [runs[words] for words in [command(name, seed) for seed in SEEDS] if words in runs]
        points = records[0]["evals"] if records else []
        numbered = [
            (number, point["step"]) for number, point in enumerate(points) if point["step"] >= method.first_step
        ]
        for number, step in numbered:
            first = number == numbered[0][0]
            cells = [method.title if first else "", str(step)]
            for metric, digits in {"judge_score": 2, "kl": 1, "response_length": 1, "eos_rate": 2}.items():
                cells.append(", ".join([f"{record['evals'][number][metric]:.{digits}f}" for record in records]))
            seconds = ", ".join([str(record["cpu_seconds"]) for record in records])
            numbers.append([*cells, seconds if first else ""])
        answers += [f"- {method.title}: {' '.join(records[0]['response'].split())}\n"] if records else []
    heads = ["claim", *[f"seed {seed}" for seed in SEEDS], "both", "verdict"]
    columns = ["method", "step", "true reward", "KL", "tokens", "ended", "CPU seconds"]
    return TABLES.format(table(heads, verdicts), table(columns, numbers), "".join(answers))


def draw(runs: dict) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    start = np.mean([record["evals"][0]["judge_score"] for record in runs.values()])
    for number, (name, method) in enumerate(METHODS.items()):
        courses = []
        for words in [command(name, seed) for seed in SEEDS]:
            if words in runs:
                points = [point for point in runs[words]["evals"] if point["step"] >= method.first_step]
                courses.append([(point["kl"], point["judge_score"]) for point in points])
                axes.plot(*np.array(courses[-1]).T, ".", color=f"C{number}", alpha=0.5)
        if courses:
            line = [(0, start), *np.mean(courses, axis=0)]
            axes.plot(*np.array(line).T, "o-", color=f"C{number}", label=method.title)
    axes.plot(0, start, "k*", markersize=12, label="initial model")
    axes.set(xlabel="KL to the initial model (nats a response)", ylabel="true reward: VADER's compound score, -1 to 1")
    axes.set_title(
        "Controlled sentiment with SmolLM2-135M-Instruct: reward for KL, three times on the way of a training\n"
        "small dots: one seed, a mean of 64 answers each; lines: means of two seeds",
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
