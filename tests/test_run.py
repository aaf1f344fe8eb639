"""Whole runs: on the test bed, and on a tiny random model against a plain training loop."""

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, SIBLINGS_BY_TIER, TOY, load_script, read_folder, read_rows, run_script, write_rows

dpo = load_script("pre_dpo")

QUICK = {"max_steps": 3, "batch_size": 8, "num_eval_prompts": 16, "eval_steps": 2, "max_new_tokens": 48}
TRAIN_METRICS = {"loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies"}
TRAIN_METRICS |= {"rewards/margins", "logps/chosen", "logps/rejected"}
EVAL_METRICS = TRAIN_METRICS - {"grad_norm", "learning_rate"}
EVAL_METRICS |= {"kl", "win_rate", "win_rate_ci95", "judge_score", "response_length", "eos_rate"}
OTHER_METRICS = {
    "perf/tokens_per_second",
    "perf/peak_memory_gb",
    "progress/epoch",
    "progress/pairs",
    "progress/seconds",
}
TIMES = {"progress/seconds", "perf/tokens_per_second", "perf/peak_memory_gb"}


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    """The first rows of the test bed's data."""
    folder = tmp_path_factory.mktemp("small-toy")
    for split, count in (("train", 48), ("test", 16)):
        with (TOY / f"{split}.jsonl").open(encoding="utf-8") as lines:
            write_rows(folder / f"{split}.jsonl", [json.loads(next(lines)) for _ in range(count)])
    return str(folder)


@pytest.fixture(scope="session")
def run_toy(small_toy, tmp_path_factory):
    """Runs a script on these; the folder of a run with the same flags as one before is that one's."""
    folders = {}

    def make(name="pre_dpo", **flags):
        key = json.dumps([name, flags], sort_keys=True)
        if key not in folders or "output_dir" in flags:
            folders[key] = Path(flags.get("output_dir", tmp_path_factory.mktemp(name) / "run"))
            script = load_script(name)
            script.main(script.Args(**QUICK | {"dataset_name": small_toy, "output_dir": str(folders[key])} | flags))
        return folders[key]

    return make


def metrics_of(folder, without=()):
    return [
        {name: value for name, value in row.items() if name not in without}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def names_of(rows, prefix):
    return {name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)}


# === What a run leaves ===


@pytest.mark.parametrize("name", SIBLINGS_BY_TIER)
def test_folder_of_a_run(run_toy, name):
    folder = run_toy(name)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"args.json", f"{name}.py", "metrics.jsonl", "samples.jsonl", "model_outputs.json", "model"}
    assert not {file for file in files if "tmp" in file or "unfinished" in file}
    assert (folder / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    record = json.loads((folder / "args.json").read_text())
    assert set(record["args"]) == set(load_script(name).Args.__dataclass_fields__)
    assert record["args"]["batch_size"] == 8 and record["versions"]["torch"] == torch.__version__
    assert record["resolved"]["learning_rate"] in (3e-4, [3e-4] * 4) and record["args"]["learning_rate"] is None
    assert "device" in record and "git_commit" in record


def test_reference_is_stored(run_toy):
    assert (run_toy() / "reference_logps.safetensors").exists()


@pytest.mark.parametrize("name", SIBLINGS_BY_TIER)
def test_metrics(run_toy, name):
    rows = [row for row in metrics_of(run_toy(name)) if names_of([row], "train/") or names_of([row], "eval/")]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and rows[0]["step"] == 0
    assert names_of(rows[:1], "eval/") >= EVAL_METRICS and not names_of(rows[:1], "train/")
    assert rows[1]["step"] == 1 and names_of(rows[1:], "eval/") >= EVAL_METRICS
    for row in rows[1:]:
        assert names_of([row], "train/") >= TRAIN_METRICS and set(row) >= OTHER_METRICS
    known = {f"train/{n}" for n in TRAIN_METRICS} | {f"eval/{n}" for n in EVAL_METRICS} | OTHER_METRICS | {"step"}
    assert not {name for row in rows for name in row if name not in known and "method/" not in name}
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("name", SIBLINGS_BY_TIER)
def test_initial_model_is_compared_with_itself_first(run_toy, name):
    first = metrics_of(run_toy(name))[0]
    assert first["eval/kl"] == 0 and first["eval/win_rate"] == 0.5 and first["eval/win_rate_ci95"] == 0


def test_samples(run_toy):
    folder = run_toy()
    rows, metrics = read_rows(folder / "samples.jsonl"), {row["step"]: row for row in metrics_of(folder)}
    test_rows = read_rows(Path(json.loads((folder / "args.json").read_text())["args"]["dataset_name"]) / "test.jsonl")
    for step in (0, 2, 3):
        samples = [row for row in rows if row["step"] == step]
        assert [row["prompt"] for row in samples] == [row["prompt"] for row in test_rows]
        means = {"kl": "logratio", "judge_score": "score", "response_length": "length", "eos_rate": "ended"}
        for metric, field in means.items():
            mean = sum(row[field] for row in samples) / len(samples)
            assert metrics[step][f"eval/{metric}"] == pytest.approx(mean, abs=1e-5)
        points = [
            (b["score"] > a["score"]) + 0.5 * (b["score"] == a["score"])
            for a, b in zip(rows[:16], samples, strict=True)
        ]
        rate = sum(points) / 16
        assert metrics[step]["eval/win_rate"] == pytest.approx(rate)
        deviation = math.sqrt(sum((point - rate) ** 2 for point in points) / 16)
        assert metrics[step]["eval/win_rate_ci95"] == pytest.approx(1.96 * deviation / 4)
    assert [row["response"] for row in samples] != [row["response"] for row in rows[:16]]


def test_screen(run_toy, tmp_path, capsys):
    run_toy(output_dir=str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "loss before the first update: 0.693147 (expected: 0.693147)" in out
    for word in ("learning rate 0.0003", "48 rows", "16 rows", "before:", "after:", "win_rate", str(tmp_path / "run")):
        assert word in out
    assert "Warning" not in out


# === Equal runs ===


def test_same_seed_same_run(run_toy, tmp_path):
    first, again = run_toy(), run_toy(output_dir=str(tmp_path / "run"))
    assert metrics_of(first, TIMES) == metrics_of(again, TIMES)
    for name in ("samples.jsonl", "model/model.safetensors", "reference_logps.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_every_evaluation_has_the_same_luck(run_toy):
    """So a policy that does not change answers as before, and what changes is due to the training."""
    rows = read_rows(run_toy(learning_rate=0.0) / "samples.jsonl")
    first, *others = ([row["response"] for row in rows if row["step"] == step] for step in (0, 2, 3))
    assert others == [first, first]


def test_another_seed_another_run(run_toy):
    folders = run_toy(), run_toy(seed=2)
    first, other = map(metrics_of, folders)
    assert first[1]["train/logps/chosen"] != other[1]["train/logps/chosen"]
    assert first[0]["eval/logps/chosen"] == other[0]["eval/logps/chosen"]
    first, other = ([row["response"] for row in read_rows(folder / "samples.jsonl")[:16]] for folder in folders)
    assert first != other


def test_micro_batches_change_no_result(run_toy):
    first, other = run_toy(), run_toy(micro_batch_tokens=300)
    for a, b in zip(*(read_rows(folder / "samples.jsonl") for folder in (first, other)), strict=True):
        assert a["response"] == b["response"] and a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["logratio"] == pytest.approx(b["logratio"], abs=1e-3)
    for a, b in zip(metrics_of(first), metrics_of(other), strict=True):
        for name in {"train/loss", "eval/loss", "train/grad_norm", "train/logps/chosen"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def naive_logps(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    logps = model(ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
    return logps[0, :-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


@pytest.mark.parametrize(
    "kind, expected",
    {
        "constant": [1.0] * 6,
        "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25],
        "cosine": [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
    }.items(),
)
def test_schedules(kind, expected):
    args = dpo.Args(lr_scheduler_type=kind, warmup_ratio=0.3)
    assert [dpo.schedule(args, step, 6) for step in range(6)] == pytest.approx(expected)


def test_kl_is_that_of_the_policy_to_the_initial_model(start, tiny_model):
    """With another policy than the initial model, and responses scored one row at a time by both."""
    run, policy = start(dpo, tiny_model(), max_new_tokens=12)
    initial = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    pairs = [dpo.Pair(i, "a", [5 + i, 9], [40, 41, 0], [50, 0]) for i in range(40)]
    run.test_pairs, run.eval_prompts = pairs, [(pair.prompt, pair.prompt_ids) for pair in pairs]
    metrics = dpo.evaluate(run, policy, dpo.partial(dpo.compute_loss, beta=0.1, label_smoothing=0.0))
    responses = dpo.generate(run, [pair.prompt_ids for pair in pairs], 1.0, run.args.seed)
    ratios = []
    with torch.no_grad():
        for pair, response in zip(pairs, responses, strict=True):
            ratios.append(
                (
                    naive_logps(policy, pair.prompt_ids, response) - naive_logps(initial, pair.prompt_ids, response)
                ).item()
            )
    assert metrics["eval/kl"] == pytest.approx(sum(ratios) / 40, rel=1e-4) and metrics["eval/kl"] > 0.5
    rows = read_rows(run.folder / "samples.jsonl")
    assert [row["logratio"] for row in rows] == pytest.approx(ratios, rel=1e-3, abs=1e-3)


def test_train_may_be_called_many_times(run_toy, start, small_toy):
    """Once a stage or an iteration: steps run on, optimiser and schedule start afresh."""
    run, policy = start(dpo, str(TOY / "policy"), **QUICK, dataset_name=small_toy)
    pairs, run.test_pairs = dpo.load_pairs(run, *dpo.read_splits(run.args))
    run.eval_prompts = dpo.load_eval_prompts(run, run.test_pairs[:2])
    run.test_pairs = run.test_pairs[:2]
    dpo.add_reference(run, run.rollout, [pairs, run.test_pairs], "reference_logps")
    loss_fn = dpo.partial(dpo.compute_loss, beta=0.1, label_smoothing=0.0)
    for _ in range(2):
        dpo.train(run, policy, lambda step: pairs[8 * step : 8 * step + 8], 2, loss_fn, 1e-3)
    rows = metrics_of(run.folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["train/learning_rate"] for row in rows[1:]] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3])
    assert rows[3]["train/loss"] < rows[1]["train/loss"]


# === Kinds of runs ===


def test_only_evaluate_other_prompts(run_toy, tmp_path):
    """As for AlpacaEval."""
    prompts = [
        {"instruction": f"Review the hotel Grand {name}.", "dataset": "x"} for name in ("Palace", "Lodge", "House")
    ]
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    folder = run_toy(max_steps=0, eval_prompts=path)
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in prompts]
    assert all(set(row) == {"instruction", "output", "generator"} for row in outputs)
    assert {row["generator"] for row in outputs} == {folder.name}
    assert [row["response"] for row in read_rows(folder / "samples.jsonl")] == [row["output"] for row in outputs]
    assert [row["step"] for row in metrics_of(folder)] == [0] and not (folder / "model").exists()


def test_saved_model_is_the_policy(run_toy, monkeypatch, tmp_path):
    policies, own_finish = [], dpo.finish_run

    def finish(run, policy):
        policies.append((run, policy))
        own_finish(run, policy)

    monkeypatch.setattr(dpo, "finish_run", finish)
    folder = run_toy(output_dir=str(tmp_path / "run"))
    ((run, policy),) = policies
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    initial = transformers.AutoModelForCausalLM.from_pretrained(TOY / "policy", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), initial.parameters(), strict=True))
    for (name, weight), expected in zip(saved.named_parameters(), policy.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    messages = [{"role": "user", "content": "Review the hotel Grand Palace."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [
        model.generate(**inputs, max_new_tokens=30, do_sample=False).tolist() for model in (saved, policy.eval())
    ]
    assert answers[0] == answers[1] and saved.generation_config.eos_token_id is not None
    assert saved.generation_config.to_diff_dict() == initial.generation_config.to_diff_dict()


def test_lora(run_toy):
    folder = run_toy(lora_rank=4)
    rows = metrics_of(folder)
    assert rows[0]["eval/kl"] == 0 and rows[-1]["eval/kl"] != 0
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (folder / "model" / "adapter_model.safetensors").stat().st_size < 400_000
    assert json.loads((folder / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        TOY / "policy"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    last = [row["response"] for row in read_rows(folder / "samples.jsonl") if row["step"] == 3]
    assert last != [row["response"] for row in read_rows(folder / "samples.jsonl") if row["step"] == 0]
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in model.named_parameters())


def test_bfloat16(run_toy):
    """The computation; what is trained and the log-probabilities are float32."""
    exact, rough = metrics_of(run_toy()), metrics_of(run_toy(dtype="bfloat16"))
    assert rough[0]["eval/kl"] == 0 and rough[1]["train/loss"] == pytest.approx(math.log(2), abs=0.01)
    for a, b in zip(exact, rough, strict=True):
        for name in {"train/loss", "eval/loss", "train/logps/chosen", "eval/logps/rejected"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=0.03)
            assert a[name] != b[name] or "loss" in name


def test_chat_template_from_a_file(run_toy, tmp_path):
    template = "<|system|>" + (TOY / "policy" / "chat_template.jinja").read_text()
    (tmp_path / "template.jinja").write_text(template)
    folder = run_toy(chat_template=str(tmp_path / "template.jinja"), max_steps=1)
    assert metrics_of(folder)[0]["eval/logps/chosen"] != metrics_of(run_toy())[0]["eval/logps/chosen"]
    assert transformers.AutoTokenizer.from_pretrained(folder / "model").chat_template == template


def test_soft_labels(run_toy, small_toy, tmp_path):
    """A pair with preference_prob 0 is one with its completions exchanged."""
    folders = []
    for name in ("soft", "exchanged"):
        for split in ("train", "test"):
            rows = read_rows(Path(small_toy) / f"{split}.jsonl")
            for row in rows[::2]:
                if name == "soft":
                    row["preference_prob"] = 0.0
                else:
                    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            write_rows(tmp_path / name / f"{split}.jsonl", rows)
        folders.append(run_toy(dataset_name=str(tmp_path / name)))
    soft, exchanged = map(metrics_of, folders)
    for a, b in zip(soft, exchanged, strict=True):
        for name in {"train/loss", "eval/loss", "train/grad_norm"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert soft[1]["train/logps/chosen"] != pytest.approx(exchanged[1]["train/logps/chosen"], rel=1e-3)
    assert metrics_of(run_toy())[3]["train/loss"] != pytest.approx(soft[3]["train/loss"], rel=1e-3)


def test_runs_without_a_judge(run_toy):
    folder = run_toy(judge_name_or_path=None)
    assert not names_of(metrics_of(folder), "eval/") & {"win_rate", "judge_score", "win_rate_ci95"}
    assert {row["score"] for row in read_rows(folder / "samples.jsonl")} == {None}


def test_finished_run_says_so(run_toy, capsys):
    folder = run_toy()
    before = read_folder(folder)
    with pytest.raises(SystemExit) as caught:
        run_toy(output_dir=str(folder), resume=True)
    assert caught.value.code == 0 and re.search(f"{re.escape(str(folder))}.* finished", capsys.readouterr().out)
    assert read_folder(folder) == before


# === Weights & Biases ===


def read_wandb(file):
    """The records of a .wandb file: blocks of 32 KiB with records of checksum, length, kind and content."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def test_tracked_run(small_toy, tmp_path):
    args = {**QUICK, "dataset_name": small_toy, "output_dir": tmp_path / "run", "wandb_project_name": "some-project"}
    flags = [word for name, value in args.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = run_script(ROOT / "pre_dpo.py", "--track", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.rglob("*.wandb")
    assert tmp_path / "run" in file.parents
    rows, config = [], {}
    for record in read_wandb(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        if kind == "run":
            assert record.run.project == "some-project" and record.run.display_name == "run"
            config |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.run.config.update
            }
    metrics = metrics_of(tmp_path / "run")
    history = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    assert history[:-1] == metrics and history[-1]["samples/nrows"] == 16
    assert config["beta"] == 0.1 and config["batch_size"] == 8 and config["learning_rate"] == 3e-4


# === The shell ===
