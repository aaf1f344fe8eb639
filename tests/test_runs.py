"""The scripts as runs: their first numbers, several devices, being killed and resumed, and what ends a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import (
    DPO_AND_SLOWLY_THE_OTHERS,
    ROOT,
    TOY,
    WORD_COUNT,
    finish,
    leave_group,
    load_plain,
    load_script,
    naive_logps,
    read_rows,
    run_script,
    start,
    text_pairs,
    weights_of,
    write_rows,
)

FLAGS = ["--num-train-epochs", "2", "--eval-steps", "3", "--num-eval-prompts", "8", "--max-new-tokens", "16"]
FLAGS += ["--batch-size", "8"]
OWN_FLAGS = {"spin": ["--num-iterations", "2", "--prompts-per-iteration", "12"]}
OWN_FLAGS["rlhf_ppo"] = ["--rollouts-per-step", "8", "--ppo-epochs", "2"]
OWN_FLAGS["grpo"] = ["--batch-size", "24", "--num-generations", "3", "--num-iterations", "2"]
# The steps of the stages. Stages of 20 pairs and 2 epochs have 6; SFT and reward model have an epoch.
STAGES = dict.fromkeys(["dpo", "ipo", "simpo", "oaif", "grpo"], [6]) | {"kto": [10], "pre_dpo": [6, 6], "spin": [4, 6]}
STAGES["rlhf_ppo"] = [3, 3, 6]
SLOW = pytest.mark.slow


def flags_of(name, data):
    return ["--dataset-name", data, *FLAGS, *OWN_FLAGS.get(name, [])]


def run_changed(name, folder, change, *flags, **options):
    """Run a script after some lines of Python have changed it."""
    program = folder.parent / "changed.py"
    program.write_text(CHANGED.format(path=str(ROOT / f"{name}.py"), change=change))
    return run_script(program, "--output-dir", folder, *flags, **options)


CHANGED = """
import importlib.util, itertools, os, random, signal, sys
spec = importlib.util.spec_from_file_location("script", {path!r})
sys.modules["script"] = script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
{change}
script.main(script.tyro.cli(script.Args))
"""


def run_killed(name, folder, *flags, at, processes=1, **options):
    """Run a script, and kill it before it clips the at-th gradient, or, if at is 0, while it saves its policy."""
    ended = run_changed(name, folder, KILLED.format(at=at), *flags, processes=processes, **options)
    assert ended.returncode == -signal.SIGKILL if processes == 1 else ended.returncode != 0, ended.stderr[-3000:]


KILLED = """
clip, calls = script.torch.nn.utils.clip_grad_norm_, itertools.count(1)
def clip_or_die(*args):
    if next(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
script.torch.nn.utils.clip_grad_norm_ = clip_or_die
if {at} == 0:
    script.transformers.PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""


def assert_close_runs(folder, expected, tolerance=1e-5):
    """Losses, gradient norms and weights, up to rounding."""
    rows, expected_rows = read_rows(folder / "metrics.jsonl"), read_rows(expected / "metrics.jsonl")
    assert len(rows) == len(expected_rows)
    for row, other in zip(rows, expected_rows, strict=True):
        for metric in {"train/loss", "train/grad_norm"} & set(other):
            assert row[metric] == pytest.approx(other[metric], rel=tolerance, abs=tolerance / 10)
    weights = weights_of(expected / "model")
    for key, value in weights_of(folder / "model").items():
        torch.testing.assert_close(value, weights[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", DPO_AND_SLOWLY_THE_OTHERS)
def test_a_run(name, data, tmp_path):
    """The first numbers are known, equal texts are ties, and the saved model is the trained one."""
    finish(name, tmp_path / "run", *flags_of(name, data))
    rows, last = read_rows(tmp_path / "run" / "metrics.jsonl"), sum(STAGES[name])
    assert [row["step"] for row in rows] == list(range(last + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (rows[0]["eval/kl"], rows[0]["eval/win_rate"]) == (0, 0.5)
    first_losses = dict.fromkeys(["dpo", "pre_dpo", "spin", "oaif"], math.log(2)) | {"ipo": 100.0, "kto": 0.5}
    if name in first_losses:
        assert rows[1]["train/loss"] == pytest.approx(first_losses[name], rel=1e-6) == rows[0]["eval/loss"]
        assert rows[1]["train/rewards/margins"] == rows[0]["eval/rewards/margins"] == 0
    if name == "rlhf_ppo":
        assert (rows[7]["train/kl"], rows[7]["train/approx_kl"]) != (0, 0)  # the second update of the step
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    before, after = ([row for row in samples if row["step"] == step] for step in (0, last))
    ties = [first["response"] == row["response"] for first, row in zip(before, after, strict=True)]
    assert len(ties) == 8 and all(row["win_rate"] == 0.5 for row, tie in zip(after, ties, strict=True) if tie)
    assert rows[-1]["eval/win_rate"] == sum(row["win_rate"] for row in after) / 8
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    initial = weights_of(TOY / "policy")
    assert any(not torch.equal(model[key], initial[key].float()) for key in initial)


@pytest.mark.parametrize(
    "name, more",
    [
        ("dpo", []),
        *[pytest.param(name, [], marks=SLOW) for name in ("ipo", "simpo", "pre_dpo", "kto")],
        pytest.param("dpo", ["--lora-rank", "4"], marks=SLOW),
    ],
)
def test_two_processes_give_what_one_gives(name, more, data, tmp_path):
    flags = [*flags_of(name, data), *more]
    finish(name, tmp_path / "one", *flags)
    finish(name, tmp_path / "two", *flags, processes=2)
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@SLOW
@pytest.mark.parametrize("name", ["spin", "oaif", "grpo", "rlhf_ppo"])
def test_two_processes_that_sample(name, data, tmp_path):
    """If answers depend only on their prompt and its place in the step, all is as with one process."""
    for processes in (1, 2):
        ended = run_changed(name, tmp_path / str(processes), ANSWERS, *flags_of(name, data), processes=processes)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close_runs(tmp_path / "2", tmp_path / "1", tolerance=1e-4)


ANSWERS = """
def generate(run, model, prompts, *_, **__):
    places = range(script.RANK, script.WORLD_SIZE * len(prompts), script.WORLD_SIZE)
    lucks = [random.Random(str(item)) for item in zip(prompts, places)]
    return [[luck.randrange(2, 800) for _ in range(luck.randrange(1, 9))] + [0] for luck in lucks]
script.generate = generate
"""


@SLOW
@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_no_process_waits_while_another_samples(more, data, tmp_path):
    """The first one has some groups of prompts to answer one after another, and the second one a single group."""
    ended = run_changed("dpo", tmp_path / "run", UNEVEN, *flags_of("dpo", data), *more, processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]


UNEVEN = """
generate = script.generate
script.generate = lambda run, model, prompts, *rest, **more: (
    generate(run, model, prompts * (1 if script.RANK else 100), *rest, **more)[: len(prompts)])
"""


KILLS = [("ipo", 5, []), ("simpo", 3, []), ("kto", 6, []), ("oaif", 4, []), ("grpo", 7, [])]  # GRPO clips twice a step
KILLS += [("dpo", at, []) for at in (0, 2)] + [("pre_dpo", at, []) for at in (0, 4, 7, 11)]
KILLS += [("spin", at, []) for at in (2, 5, 8)]
KILLS += [("rlhf_ppo", at, []) for at in (3, 4, 6, 7, 16)]  # PPO clips two gradients an update, with two updates a step
LORA_KILLS = [("dpo", 4), ("pre_dpo", 7), ("spin", 8), ("oaif", 5), ("rlhf_ppo", 12)]
KILLS += [(name, at, ["--lora-rank", "4"]) for name, at in LORA_KILLS]


@pytest.mark.parametrize("name, at, more", [("dpo", 6, []), *[pytest.param(*kill, marks=SLOW) for kill in KILLS]])
def test_killed_runs_go_on_bit_for_bit(name, at, more, data, tmp_path, whole_runs):
    """Before the first checkpoint, in each stage and between stages, by the same command with --resume."""
    flags = [*flags_of(name, data), "--save-steps", "2", *more]
    run_killed(name, tmp_path / "killed", *flags, at=at)
    finish(name, tmp_path / "killed", *flags, "--resume")
    whole = whole_runs(name, more)
    for file in ["metrics.jsonl", "samples.jsonl"] + ["annotated.jsonl"] * (name == "oaif"):
        assert (tmp_path / "killed" / file).read_text() == (whole / file).read_text()
    weights, expected = weights_of(tmp_path / "killed" / "model"), weights_of(whole / "model")
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


@pytest.fixture(scope="module")
def whole_runs(data, tmp_path_factory):
    """Folders of runs that were not killed, each made once."""
    made = {}

    def make(name, more):
        if (name, *more) not in made:
            made[name, *more] = tmp_path_factory.mktemp("whole") / "run"
            finish(name, made[name, *more], *flags_of(name, data), "--save-steps", "2", *more)
        return made[name, *more]

    return make


@SLOW
def test_checkpoint_of_two_processes_goes_on_with_one(data, tmp_path, whole_runs):
    flags = [*flags_of("dpo", data), "--save-steps", "2"]
    run_killed("dpo", tmp_path / "killed", *flags, at=4, processes=2)
    assert "goes on at step 2" in finish("dpo", tmp_path / "killed", *flags, "--resume").stdout
    assert_close_runs(tmp_path / "killed", whole_runs("dpo", []))


@SLOW
@pytest.mark.parametrize("at", [5, 6])
def test_reward_model_of_two_processes_goes_on_after_an_evaluation(at, data, tmp_path):
    """The checkpoint of step 4 follows an evaluation: it must hold trained weights, and no gathered copy."""
    flags = [*flags_of("rlhf_ppo", data), "--save-steps", "2", "--eval-steps", "2", "--max-steps", "4"]
    flags += ["--reward-epochs", "2"]
    finish("rlhf_ppo", tmp_path / "whole", *flags, processes=2)
    run_killed("rlhf_ppo", tmp_path / "killed", *flags, at=at, processes=2)
    finish("rlhf_ppo", tmp_path / "killed", *flags, "--resume", processes=2)
    rows, expected = (read_rows(tmp_path / key / "metrics.jsonl") for key in ("killed", "whole"))
    for row, other in zip(rows[1:8], expected[1:8], strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
    weights, expected = (weights_of(tmp_path / key / "reward_model") for key in ("killed", "whole"))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5)


MIXED = [(name, 2) for name in ("dpo", "pre_dpo", "spin", "kto", "oaif", "grpo", "rlhf_ppo")]
MIXED += [(name, 1) for name in ("dpo", "spin", "rlhf_ppo")]


@SLOW
@pytest.mark.parametrize("name, processes", MIXED)
def test_mixed_precision(name, processes, data, tmp_path):
    """bfloat16 as on a GPU, on two processes with adapters: the first numbers are exact, and the run ends well."""
    flags = [*flags_of(name, data), "--dtype", "bfloat16"]
    flags += ["--lora-rank", "4", "--gradient-checkpointing"] if processes == 2 else []
    flags += {"rlhf_ppo": ["--ppo-epochs", "1"], "grpo": ["--num-iterations", "1"]}.get(name, [])
    finish(name, tmp_path / "run", *flags, processes=processes)
    check_mixed_precision(name, read_rows(tmp_path / "run" / "metrics.jsonl"))


def check_mixed_precision(name, rows):
    assert len(rows) == sum(STAGES[name]) + 1 and rows[0]["eval/kl"] == 0
    if name in ("dpo", "pre_dpo", "spin", "oaif"):
        assert rows[1]["train/loss"] == pytest.approx(math.log(2)) and rows[1]["train/rewards/margins"] == 0
    if name == "rlhf_ppo":
        assert rows[7]["train/kl"] == rows[7]["train/ratio_error"] == 0
    if name == "grpo":
        assert rows[1]["train/kl"] == 0 and rows[1]["train/ratio"] == pytest.approx(1, abs=1e-6)


@SLOW
def test_gradient_checkpointing_changes_nothing(data, tmp_path):
    flags = [*flags_of("dpo", data), "--max-steps", "2"]
    finish("dpo", tmp_path / "plain", *flags)
    finish("dpo", tmp_path / "checkpointing", *flags, "--gradient-checkpointing")
    assert_close_runs(tmp_path / "checkpointing", tmp_path / "plain")


def test_finished_runs_and_changed_data_are_refused(data, tmp_path, monkeypatch):
    dpo, folder = load_script("dpo"), shutil.copytree(data, tmp_path / "data")
    flags = {"dataset_name": str(folder), "output_dir": str(tmp_path / "run"), "max_steps": 1, "max_new_tokens": 8}
    dpo.main(dpo.Args(**flags))
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    for resume in (False, True):
        with pytest.raises(SystemExit, match="holds a run: name another --output-dir"):
            dpo.main(dpo.Args(**flags, resume=resume))
        leave_group()
    assert read_rows(tmp_path / "run/metrics.jsonl") == rows
    shutil.rmtree(tmp_path / "run/model")  # as if it had been killed
    with pytest.raises(SystemExit, match="error: beta, max_steps changed since the run"):
        dpo.main(dpo.Args(**flags | {"max_steps": 2}, beta=0.2, resume=True))
    leave_group()
    for first, plan in ((1, dpo.plan_batches), (0, lambda *_: [[0], [1]])):  # other data, or other steps
        write_rows(folder / "train.jsonl", read_rows(data / "train.jsonl")[first:])
        monkeypatch.setattr(dpo, "plan_batches", plan)
        with pytest.raises(SystemExit, match="error: data, devices or torch changed since the run"):
            dpo.main(dpo.Args(**flags, resume=True))
        leave_group()
    with pytest.raises(SystemExit, match="--resume needs --output-dir"):
        start("dpo", TOY / "policy", resume=True)


def test_files_that_are_not_the_runs_are_left_alone(tmp_path):
    (folder := tmp_path / "rate=1,2").mkdir()  # a name that W&B would refuse
    (folder / "mine.jsonl").write_text('{"step": 1}\n{}\n')
    for resume in (False, True):
        dpo, run = load_script("dpo"), start("dpo", TOY / "policy", output_dir=str(folder), resume=resume)
        dpo.open_folder(run, [dpo.Pair(0, "a", {}, [5], [6], [7], 1.0)])
    assert (folder / "mine.jsonl").read_text() == '{"step": 1}\n{}\n'


DEFAULTS = {name: {"learning_rate": 5e-7} for name in ("dpo", "ipo", "oaif")}
DEFAULTS |= {"simpo": {"learning_rate": 1e-6}, "grpo": {"learning_rate": 1e-6}, "kto": {"learning_rate": 5e-6}}
DEFAULTS["pre_dpo"] = {"learning_rate": 6e-7, "guide_learning_rate": 6e-7, "guide_beta": 0.01}
DEFAULTS["spin"] = {"learning_rate": [5e-7, 5e-7, 1e-7, 1e-7], "beta": [0.1, 0.1, 0.1, 5.0]}
DEFAULTS["rlhf_ppo"] = dict.fromkeys(["learning_rate", "sft_learning_rate", "reward_learning_rate"], 3e-6)


@pytest.mark.parametrize("name", DPO_AND_SLOWLY_THE_OTHERS)
def test_defaults_work_alone(name, tiny_model, tmp_path):
    """A copy in an empty folder runs with a model and a file and nothing else."""
    (tmp_path / "script.py").write_text((ROOT / f"{name}.py").read_text())
    write_rows(tmp_path / "pairs.jsonl", text_pairs(20))
    flags = ["--model-name-or-path", tiny_model(), "--dataset-name", "pairs.jsonl"]
    if name == "grpo":
        (tmp_path / "reward.py").write_text("def reward(prompts, completions, **columns): return map(len, completions)")
        flags += ["--reward-name-or-path", "reward.py", "--max-steps", "2"]
    ended = run_script("script.py", *flags, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (record,) = tmp_path.glob("runs/*/args.json")
    args = json.loads(record.read_text())["args"]
    assert {flag: args[flag] for flag in DEFAULTS[name]} == DEFAULTS[name]
    assert args["judge_name_or_path"] == ("reward.py" if name == "grpo" else None)  # the reward scores the samples


def test_a_loss_that_is_not_finite(data):
    dpo, run = load_script("dpo"), start("dpo", TOY / "policy", dataset_name=str(data))
    policy = dpo.load_model(run, run.args.model_name_or_path)
    policy.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(SystemExit, match=r"error: a log-probability in rows \[0, 1, 2\] is not finite"):
        dpo.forward(policy, dpo.load_pairs(run)[0][:3])


def test_a_gradient_that_is_not_finite():
    dpo, run = load_script("dpo"), start("dpo", TOY / "policy")
    policy = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    optimizer, _, _ = dpo.start_training(run, {"policy": policy}, lr=1.0, steps=1)
    before = [weight.detach().clone() for weight in policy.parameters()]
    for weight in policy.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    with pytest.raises(SystemExit, match="error: the gradient of the policy is not finite"):
        dpo.update(run, {"policy": policy}, optimizer, learning_rate=1.0)
    assert all(torch.equal(weight, other) for weight, other in zip(policy.parameters(), before, strict=True))


def test_a_step_is_taken_at_its_learning_rate_and_unclipped_if_so_wished():
    """AdamW's first step moves each weight by the rate, whatever its gradient is, but not if that is 0."""
    dpo, run, model = load_script("dpo"), start("dpo", TOY / "policy", max_grad_norm=0.0), torch.nn.Linear(3, 1)
    before, model.weight.grad = model.weight.detach().clone(), torch.full((1, 3), 5.0)
    optimizer, _, _ = dpo.start_training(run, {"policy": model}, lr=1.0, steps=1)
    dpo.update(run, {"policy": model}, optimizer, learning_rate=0.25)
    torch.testing.assert_close(model.weight.detach(), before - 0.25)


def test_a_python_file_as_the_judge(data, tmp_path):
    """It gets the rows' other columns, and its scores decide on the wins."""
    dpo, rows = load_script("dpo"), [row | {"word": "great"} for row in read_rows(data / "train.jsonl")]
    rows[0]["prompt"][0]["name"] = "Ann"  # messages may have keys that others lack
    (tmp_path / "judge.py").write_text(WORD_COUNT)
    flags = {"dataset_name": write_rows(tmp_path / "data.jsonl", rows), "dataset_test_split": "train"}
    flags |= {"judge_name_or_path": str(tmp_path / "judge.py"), "max_steps": 1, "learning_rate": 1e-2}
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    samples = read_rows(tmp_path / "run/samples.jsonl")
    for row, first in zip(samples, samples[:20] * 2, strict=True):
        score, first_score = [each["response"].count("great") for each in (row, first)]
        assert row["judge_score"] == score and row["prompt"].startswith("<|user|>")
        assert row["win_rate"] == (0.5 if score == first_score else score > first_score)
    wins = torch.tensor([row["win_rate"] for row in samples[20:]])
    expected = 1.96 * wins.std(correction=0).item() / 20**0.5
    metrics, run = read_rows(tmp_path / "run/metrics.jsonl"), start("dpo", TOY / "policy")
    assert metrics[1]["eval/win_rate_ci95"] == pytest.approx(expected) and expected > 0
    pairs = [dpo.Pair(0, prompt, {"word": "a"}, [], [], [], 1.0) for prompt in ("text", rows[0]["prompt"])]
    assert dpo.judge(run, str(tmp_path / "judge.py"), pairs, ["a", "b"]) == [1, 0]  # text and chat, side by side


def test_no_evaluation_on_samples(data, tmp_path):
    dpo, folder = load_script("dpo"), tmp_path / "run"
    dpo.main(dpo.Args(dataset_name=str(data), num_eval_prompts=0, max_steps=1, output_dir=str(folder)))
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2)) and "eval/kl" not in rows[0]
    assert not (folder / "samples.jsonl").exists()


def test_learning_rates():
    """They rise in a tenth of the steps, fall in the others, and are never 0: two of 20 steps are warm-up."""
    model, falls = torch.nn.Linear(1, 1), {"linear": lambda share: 1 - share, "constant": lambda share: 1}
    falls["cosine"] = lambda share: (1 + math.cos(math.pi * share)) / 2
    for kind, fall in falls.items():
        run = start("dpo", TOY / "policy", lr_scheduler_type=kind)
        _, rates, _ = load_script("dpo").start_training(run, {"policy": model}, 1.0, 20, start=100)
        rise = [1, 1] if kind == "constant" else [1 / 2, 1]
        assert rates == pytest.approx(dict(enumerate(rise + [fall(step / 19) for step in range(1, 19)], start=101)))


def test_numbers_of_samples(tiny_model, data, tmp_path, monkeypatch):
    """KL is the sum of log-ratios over an answer's tokens, its stop token included, averaged over the answers."""
    dpo, answers = load_script("dpo"), [[5, 6, 0], [7, 0], [8, 9, 10, 11]]
    flags = {"dataset_name": str(data), "num_eval_prompts": 3, "output_dir": str(tmp_path / "run")}
    run = start("dpo", tiny_model(), **flags)
    _, pairs = dpo.load_pairs(run)
    dpo.open_folder(run, pairs)
    asked = []  # of the policy: prompts and seed, temperature
    monkeypatch.setattr(dpo, "generate", lambda *given, **more: asked.append((*given[2:], more)) or answers)
    policy = dpo.load_model(run, tiny_model(initializer_range=0.2))
    metrics = dpo.evaluate(run, policy, pairs, lambda some: (torch.zeros(len(some)), {}), step=0)
    models = [load_plain(tiny_model(**changes)) for changes in ({"initializer_range": 0.2}, {})]
    kls = []
    for pair, answer in zip(pairs, answers, strict=True):
        new, old = [naive_logps(model, pair.prompt_ids, answer).sum().item() for model in models]
        kls.append(new - old)
    assert metrics["eval/kl"] == pytest.approx(sum(kls) / 3, rel=1e-4) and abs(sum(kls)) > 1
    assert asked == [([pair.prompt_ids for pair in pairs], run.args.seed, {"temperature": 1.0})]
    assert metrics["eval/response_length"] == 3 and metrics["eval/eos_rate"] == pytest.approx(2 / 3)


def test_tracking_without_a_login_leaves_nothing_behind(data, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_API_KEY": "", "WANDB_SILENT": "true", "HOME": str(tmp_path), "NETRC": str(tmp_path / "n")}
    command = [sys.executable, ROOT / "dpo.py", "--track", "--output-dir", "run", *flags_of("dpo", data)]
    options = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True, "stdin": subprocess.DEVNULL}
    options["timeout"] = 300
    ended = subprocess.run(list(map(str, command)), **options)
    assert ended.returncode != 0 and "No API key configured" in ended.stderr and not (tmp_path / "run").exists()


@SLOW
def test_tracked_runs_have_the_samples_as_tables(data, tmp_path):
    """Wandb is offline, and writes to the folder where the script is started."""
    ended = run_script(ROOT / "dpo.py", "--track", "--output-dir", "run", *flags_of("dpo", data), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    tables, rows = [], read_rows(tmp_path / "run/samples.jsonl")
    for file in tmp_path.glob("wandb/offline-run-*/files/media/table/eval/samples_*.table.json"):
        table = json.loads(file.read_text())
        tables += [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert sorted(tables, key=lambda row: row["step"]) == rows and len(rows) == 24
