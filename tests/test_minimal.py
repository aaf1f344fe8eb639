"""dpo.py, ipo.py and simpo.py as runs: their data, their numbers, several devices, and being killed and resumed."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import MINIMAL, ROOT, TOY, load_script, read_rows, run_script, text_pairs, write_rows
from safetensors.torch import load_file
from test_contract import read_lines, split_regions

dpo = load_script("dpo")
every_script = pytest.mark.parametrize("name", MINIMAL)
SIBLINGS = [pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "simpo")]
dpo_and_slowly_its_siblings = pytest.mark.parametrize("name", ["dpo", *SIBLINGS])
LORA = pytest.param(["--lora-rank", "4"], marks=pytest.mark.slow, id="lora")
FLAGS = ["--num-train-epochs", "2", "--eval-steps", "3", "--num-eval-prompts", "8", "--max-new-tokens", "16"]
FLAGS += ["--batch-size", "8"]


@pytest.fixture(autouse=True)
def group():
    """The scripts make a process group for themselves; one that ended early has left it."""
    yield
    if dpo.dist.is_initialized():
        dpo.dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", read_rows(TOY / "train.jsonl")[:20])
    write_rows(folder / "test.jsonl", read_rows(TOY / "test.jsonl")[:8])
    return folder


def start(model, **flags):
    """A Run as main makes it."""
    if dpo.dist.is_initialized():
        dpo.dist.destroy_process_group()
    return dpo.start_run(dpo.Args(model_name_or_path=model, **flags))


def run(name, folder, *flags, processes=1, killed_at=None):
    """A script in a process of its own, or in several; one that is killed is so before the update of a step."""
    program = ROOT / f"{name}.py"
    if killed_at:
        program = folder.parent / "killed.py"
        program.write_text(KILLED.format(path=str(ROOT / f"{name}.py"), step=killed_at))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, program, "--output-dir", folder, *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


KILLED = """
import importlib.util, itertools, os, signal, sys
spec = importlib.util.spec_from_file_location("script", {path!r})
sys.modules["script"] = script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
clip, calls = script.torch.nn.utils.clip_grad_norm_, itertools.count(1)
def clip_or_die(*args):
    if next(calls) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
script.torch.nn.utils.clip_grad_norm_ = clip_or_die
script.main(script.tyro.cli(script.Args))
"""


def finish(*args, **options):
    ended = run(*args, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def weights_of(folder):
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


# === The contract ===


@every_script
def test_length(name):
    lines = read_lines(name)
    assert len(lines) <= 650
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("def compute_loss")) < 140
    functions = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(functions) <= 35
    assert not [node.name for node in functions if node.end_lineno - node.lineno + 1 > 65]


@every_script
def test_text_outside_the_regions_is_the_same(name):
    assert split_regions(read_lines(name))[1] == split_regions(read_lines("dpo"))[1]


@every_script
def test_regions(name):
    assert [region for region, _ in split_regions(read_lines(name))[0]] == ["header", "args", "loss", "procedure"]


@every_script
def test_every_flag_is_read_and_none_is_set(name):
    text = (ROOT / f"{name}.py").read_text()
    for flag in load_script(name).Args.__dataclass_fields__:
        assert re.search(rf"args\.{flag}\b", text), flag
        assert not re.search(rf"args\.{flag} = ", text), flag


@dpo_and_slowly_its_siblings
def test_help_has_the_methods_flags_first(name):
    text = run_script(ROOT / f"{name}.py", "--help").stdout
    assert "https://arxiv.org/abs/" in text
    flags = re.findall(r"^│ (--[a-z-]+)", text, re.M)
    own = len(split_regions(read_lines(name))[0][1][1]) - 2  # without the group's name and DEFAULTS
    assert flags[0] == "--beta" and flags[own - 1] == "--learning-rate" and flags[own] == "--model-name-or-path"


# === Data ===


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


FORMS = {
    "messages": {"prompt": chat("a"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
    "conversations": {"chosen": chat("a", "b"), "rejected": chat("a", "c")},
    "UltraFeedback": {"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c")},
}


@pytest.mark.parametrize("form", FORMS)
def test_chat_forms(form):
    run = start(str(TOY / "policy"))
    (pair,) = dpo.encode_rows(run, [FORMS[form]], "train")
    texts = run.tokenizer.batch_decode([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
    assert texts == ["<|user|>a<|assistant|>", "b<|end|>", "c<|end|>"]
    assert pair.prompt == chat("a")


def test_strings_end_with_the_stop_token_once():
    run = start(str(TOY / "policy"))
    row = {"prompt": "Review it.", "chosen": "good", "rejected": "bad<|end|> and more", "preference_prob": 0.7}
    (pair,) = dpo.encode_rows(run, [row], "train")
    assert run.tokenizer.batch_decode([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]) == [
        "Review it.", "good<|end|>", "bad<|end|>",
    ]  # fmt: skip
    assert pair.preference_prob == 0.7


BAD_ROWS = {
    "in none of the accepted forms": {"prompt": "a", "chosen": 7, "rejected": "c"},
    "keys ['question']": {"question": "a"},
    "without any empty one": {"prompt": "a", "chosen": "", "rejected": "c"},
    "preference_prob is 1.5": {"prompt": "a", "chosen": "b", "rejected": "c", "preference_prob": 1.5},
}


@pytest.mark.parametrize("message", list(BAD_ROWS))
def test_bad_rows_end_the_run(message):
    run = start(str(TOY / "policy"))
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(SystemExit, match="^error: row 1 of split train") as error:
        dpo.encode_rows(run, [good, BAD_ROWS[message]], "train")
    assert message.removeprefix("in none of the accepted forms") in str(error.value)


def test_long_and_equal_pairs_are_dropped():
    run = start(str(TOY / "policy"), max_length=12)
    rows = [{"prompt": "a", "chosen": "b " * n, "rejected": "c"} for n in (1, 3, 40)]
    rows.append({"prompt": "a", "chosen": "b", "rejected": "b"})
    assert [pair.row for pair in dpo.encode_rows(run, rows, "train")] == [0, 1]


def test_file_without_a_test_split(tmp_path):
    """The last tenth of the pairs is kept for testing; a file that keeps its time but not its rows is read anew."""
    file = tmp_path / "pairs.jsonl"
    write_rows(file, text_pairs(40))
    time = file.stat().st_mtime_ns
    train_pairs, test_pairs = dpo.load_pairs(start(str(TOY / "policy"), dataset_name=str(file)))
    assert ([pair.row for pair in train_pairs], [pair.row for pair in test_pairs]) == (
        list(range(36)),
        [36, 37, 38, 39],
    )
    write_rows(file, text_pairs(20))
    os.utime(file, ns=(time, time))
    train_pairs, _ = dpo.load_pairs(start(str(TOY / "policy"), dataset_name=str(file)))
    assert len(train_pairs) == 18


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches(monkeypatch, world_size):
    """Every row once, no group over the limit, and as many groups on each process."""
    monkeypatch.setattr(dpo, "WORLD_SIZE", world_size)
    lengths = torch.randint(1, 60, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    plans = []
    for rank in range(world_size):
        monkeypatch.setattr(dpo, "RANK", rank)
        plans.append(dpo.micro_batches(lengths, 100))
        for group in plans[-1]:
            assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100
    assert sorted(sum([sum(plan, []) for plan in plans], [])) == list(range(60))
    assert len({len(plan) for plan in plans}) == 1


def test_batches_leave_out_other_pairs_in_each_epoch(monkeypatch):
    monkeypatch.setattr(dpo, "WORLD_SIZE", 4)
    batches = dpo.plan_batches(dpo.Args(batch_size=8, num_train_epochs=2), 19)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    assert all(len(set(sum(epoch, []))) == 16 for epoch in (batches[:2], batches[2:]))
    assert set(sum(batches[:2], [])) != set(sum(batches[2:], []))
    with pytest.raises(SystemExit, match="error: --batch-size 6"):
        dpo.plan_batches(dpo.Args(batch_size=6), 19)


# === Model and sampling ===


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen3", "gemma2", "granite", "cohere", "gpt2"])
def test_sequence_logps_and_samples_are_those_of_single_rows(tiny_model, family):
    """Padding, the mask of logits and the cache change nothing: a row alone, without any of them, gives the same."""
    run = start(tiny_model(family), max_new_tokens=12)
    model = dpo.load_model(run, run.args.model_name_or_path)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, answer in ((3, 4), (9, 1), (5, 12)):
        ids = torch.randint(2, 800, (prompt + answer,), generator=generator).tolist()
        rows.append((ids[:prompt], ids[prompt:]))
    uniforms = torch.rand(3, 12, generator=generator)
    with torch.no_grad():
        found = dpo.sequence_logps(model, rows)
        answers = dpo.sample(run, model, [prompt for prompt, _ in rows], uniforms, temperature=0.7)
        for i, (prompt, answer) in enumerate(rows):
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))
            assert found[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
            sampled = []
            while len(sampled) < 12 and (not sampled or sampled[-1] not in run.stop_ids):
                cdf = (model(torch.tensor([prompt + sampled])).logits[0, -1] / 0.7).softmax(-1).cumsum(-1)
                sampled.append(torch.searchsorted(cdf, uniforms[i, len(sampled)] * cdf[-1], right=True).item())
            assert answers[i] == sampled


def test_dropout_is_off(tiny_model):
    run = start(tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True).train()
    rows = [([5, 6, 7], [8, 9])]
    assert dpo.sequence_logps(model, rows).item() == dpo.sequence_logps(model, rows).item()


def test_weights_missing_from_the_files(tiny_model):
    run = start(tiny_model())
    with pytest.raises(SystemExit, match="has no weights for score.weight"):
        dpo.load_model(run, run.args.model_name_or_path, transformers.AutoModelForSequenceClassification)


def test_lora_holds_its_base_once_in_the_dtype_of_the_computation(tiny_model):
    run = start(tiny_model(), lora_rank=2, dtype="bfloat16")
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    dtypes = {(weight.requires_grad, weight.dtype) for weight in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert run.args.learning_rate == 5e-6


def test_root_is_sharded_again_after_a_pass_without_gradients(tiny_model):
    """Else a checkpoint after an evaluation would hold the root's gathered copy, and the next update be lost."""
    run = start(tiny_model(), dtype="bfloat16")
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    rows = [([5, 6, 7], [8, 9])]

    def assert_sharded():
        for weight in model.parameters():
            assert weight.dtype == torch.float32 and type(weight.data).__name__ == "DTensor"
            assert weight.grad is not None

    dpo.sequence_logps(model, rows).sum().backward()
    with torch.no_grad():
        dpo.sequence_logps(model, rows)
    assert_sharded()
    with dpo.inference(model):
        dpo.sequence_logps(model, rows)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_sharded()


# === Runs ===


@dpo_and_slowly_its_siblings
def test_a_run(name, data, tmp_path):
    """Checks at step 0, ties, and that the saved model is the trained one."""
    finish(name, tmp_path / "run", "--dataset-name", data, *FLAGS)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7)) and all(map(math.isfinite, rows[3].values()))
    assert (rows[0]["eval/kl"], rows[0]["eval/win_rate"]) == (0, 0.5)
    if name != "simpo":
        expected = {"dpo": math.log(2), "ipo": 1 / (2 * 0.05) ** 2}[name]
        assert rows[1]["train/loss"] == pytest.approx(expected, rel=1e-6) == rows[0]["eval/loss"]
        assert rows[1]["train/rewards/margins"] == rows[0]["eval/rewards/margins"] == 0
    assert rows[6]["train/loss"] < rows[1]["train/loss"]
    samples = [row for row in read_rows(tmp_path / "run" / "samples.jsonl") if row["step"] in (0, 6)]
    for before, after in zip(samples[:8], samples[8:], strict=True):
        assert before["response"] != after["response"] or after["win_rate"] == 0.5
    tie = sum(before["response"] == after["response"] for before, after in zip(samples[:8], samples[8:], strict=True))
    wins = sum(row["win_rate"] for row in samples[8:])
    assert rows[6]["eval/win_rate"] == wins / 8 and wins >= tie / 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    initial = load_file(TOY / "policy" / "model.safetensors")
    assert any(not torch.equal(model.state_dict()[key], initial[key].float()) for key in initial)


@pytest.mark.parametrize("flags", [pytest.param([], id="full"), LORA])
@dpo_and_slowly_its_siblings
def test_two_processes_and_being_killed(name, flags, data, tmp_path):
    """Two processes give the losses, norms and weights of one; a killed run goes on bit for bit, also on one of two."""
    flags = ["--dataset-name", data, *FLAGS, "--save-steps", "2", *flags]
    folders = {key: tmp_path / key / "run" for key in ("whole", "two", "killed", "killed two")}
    for folder in folders.values():
        folder.parent.mkdir()
    finish(name, folders["whole"], *flags)
    finish(name, folders["two"], *flags, processes=2)
    assert run(name, folders["killed"], *flags, killed_at=6).returncode == -signal.SIGKILL
    assert run(name, folders["killed two"], *flags, killed_at=4, processes=2).returncode != 0
    for key, step in (("killed", 4), ("killed two", 2)):
        assert f"goes on after step {step}" in finish(name, folders[key], "--resume").stdout
    whole, weights = read_rows(folders["whole"] / "metrics.jsonl"), weights_of(folders["whole"])
    for key in ("two", "killed two"):
        rows = read_rows(folders[key] / "metrics.jsonl")
        assert len(rows) == len(whole)
        for row, expected in zip(rows[1:], whole[1:], strict=True):
            for metric in ("train/loss", "train/grad_norm"):
                assert row[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-6)
        for weight, value in weights_of(folders[key]).items():
            torch.testing.assert_close(value, weights[weight], rtol=1e-5, atol=1e-5)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (folders["killed"] / file).read_text() == (folders["whole"] / file).read_text()
    assert all(torch.equal(value, weights[key]) for key, value in weights_of(folders["killed"]).items())


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_killed_at_any_step(step, data, tmp_path):
    """Also before the first checkpoint, and where an evaluation stands between backward pass and checkpoint."""
    flags = ["--dataset-name", data, *FLAGS, "--save-steps", "3"]
    for key in ("whole", "killed"):
        (tmp_path / key).mkdir()
    finish("dpo", tmp_path / "whole" / "run", *flags)
    assert run("dpo", tmp_path / "killed" / "run", *flags, killed_at=step).returncode == -signal.SIGKILL
    finish("dpo", tmp_path / "killed" / "run", "--resume")
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / "run" / file).read_text() == (tmp_path / "whole" / "run" / file).read_text()


def test_changed_data_are_refused(data, tmp_path):
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", read_rows(data / "train.jsonl"))
    write_rows(folder / "test.jsonl", read_rows(data / "test.jsonl"))
    flags = ["--dataset-name", folder, *FLAGS, "--max-steps", "1"]
    finish("dpo", tmp_path / "run", *flags)
    again = run("dpo", tmp_path / "run", *flags)
    assert again.returncode == 1 and "holds a run: go on with it by --resume" in again.stderr
    write_rows(folder / "train.jsonl", read_rows(data / "train.jsonl")[1:])
    changed = run("dpo", tmp_path / "run", "--resume")
    assert changed.returncode == 1 and "has changed since the run" in changed.stderr


@dpo_and_slowly_its_siblings
def test_defaults_work_alone(name, tiny_model, tmp_path):
    """A copy in an empty folder runs with a model and a file and nothing else."""
    (tmp_path / "script.py").write_text((ROOT / f"{name}.py").read_text())
    write_rows(tmp_path / "pairs.jsonl", text_pairs(20))
    command = ["script.py", "--model-name-or-path", tiny_model(), "--dataset-name", "pairs.jsonl"]
    ended = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (record,) = tmp_path.glob("runs/*/args.json")
    args = json.loads(record.read_text())["args"]
    rate = 1e-6 if name == "simpo" else 5e-7
    assert (args["learning_rate"], args["judge_name_or_path"], args["max_length"]) == (rate, None, 896)


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(TOY / "policy")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(TOY / "policy").save_pretrained(tmp_path / "model")
    run = start(str(tmp_path / "model"), dataset_name=str(data))
    policy = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    pairs, _ = dpo.load_pairs(run)
    loss_fn = dpo.partial(dpo.compute_loss, beta=0.1, label_smoothing=0.0)
    with pytest.raises(SystemExit, match="error: a loss in rows .* is not finite"):
        dpo.mean_loss(run, policy, pairs[:3], loss_fn, backward=True)


def test_tracking_without_a_login_leaves_nothing_behind(data, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_API_KEY": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    command = [sys.executable, ROOT / "dpo.py", "--track", "--dataset-name", data, *FLAGS, "--output-dir", "run"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ended.returncode != 0 and not (tmp_path / "run").exists()
