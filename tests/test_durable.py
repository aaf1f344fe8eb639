"""Runs that are stopped, at any moment and by anything, and go on to the same result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SIBLINGS,
    SIBLINGS_BY_TIER,
    SLOW_SIBLINGS,
    TOY,
    load_script,
    read_folder,
    read_rows,
    write_rows,
)
from safetensors.torch import load_file, save_file

SCRATCH = tempfile.TemporaryDirectory(prefix="cleanpo-")  # for runs that several tests look at
FLAGS = "--num-train-epochs 2 --eval-steps 3 --num-eval-prompts 8 --max-new-tokens 16 --batch-size 8".split()
OWN_FLAGS = {"spin": ["--num-iterations", "2", "--no-mix-previous"]}  # as few steps as the other scripts have
OWN_FLAGS |= {"rlhf_ppo": ["--rollouts-per-step", "8", "--ppo-epochs", "2"]}

# A script with a fault: `at` does something before a call, `about` counts only the calls with such a path.
PATCHED = """
import errno, importlib.util, itertools, os, pathlib, signal, sys, time
spec = importlib.util.spec_from_file_location("script", {path!r})
sys.modules["script"] = script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

def at(owner, name, number, action, about=""):
    function, calls = getattr(owner, name), itertools.count(1)
    def patched(*args, **options):
        if not about or any(about in str(a) for a in args if isinstance(a, (str, pathlib.Path))):
            if number in (0, next(calls)):  # 0: before each
                action(*args, **options)
        return function(*args, **options)
    setattr(owner, name, patched)

def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def terminate(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)

def interrupt(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)

def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

optimisation = script.torch.nn.utils  # its clip_grad_norm_ is called once a step, between gradients and update
save_file = script.save_file
{patch}
script.main(script.tyro.cli(script.Args))
"""


@cache
def data_folder(train_rows=20, spoiled_row=None):
    folder = Path(SCRATCH.name) / f"data-{train_rows}-{spoiled_row}"
    rows = read_rows(TOY / "train.jsonl")[:train_rows]
    if spoiled_row is not None:
        rows[spoiled_row]["chosen"] = 7
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", read_rows(TOY / "test.jsonl")[:8])
    return folder


def new_folder():
    """Where a run may be: always a folder of this name, since the name is in the results."""
    return Path(tempfile.mkdtemp(dir=SCRATCH.name)) / "run"


def run(name, folder, *flags, patch="", processes=1):
    """A script in a process of its own on the CPU, or in several under torchrun, all of them with the patch."""
    program = ROOT / f"{name}.py"
    if patch:
        patched = folder.parent / "patched.py"
        patched.write_text(PATCHED.format(path=str(program), patch=patch))
        program = patched
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    flags = [*FLAGS, *OWN_FLAGS.get(name, []), *flags]
    command = [*launcher, program, "--dataset-name", data_folder(), *flags, "--output-dir", folder]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder.parent}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "500"}
    with subprocess.Popen(list(map(str, command)), env=environment, **options) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes then
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def finish(name, folder, *flags, **options):
    ended = run(name, folder, *flags, **options)
    assert ended.returncode == 0, ended.stderr
    return ended


@cache
def whole_run(name, *flags, processes=1):
    """The folder of a run that was never stopped. Not to be changed."""
    folder = new_folder()
    finish(name, folder, *flags, processes=processes)
    return folder


@cache
def killed_run(name, *flags):
    """The folder of a run that was killed in its second epoch, a step after a checkpoint. Not to be changed."""
    folder = new_folder()
    killed = run(name, folder, "--save-steps", "2", *flags, patch='at(optimisation, "clip_grad_norm_", 6, kill)')
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints(folder) == ["checkpoint-4"]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    return folder


def copy_of(folder):
    return Path(shutil.copytree(folder, new_folder()))


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def metrics_of(folder):
    """All rows, without what depends on the clock and on the machine."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "progress/seconds" and not k.startswith("perf/")} for row in rows]


def assert_same(folder, expected):
    """Two finished runs have the same results, bit for bit."""
    assert metrics_of(folder) == metrics_of(expected)
    for name in ("samples.jsonl", "model_outputs.json"):
        assert (folder / name).read_text() == (expected / name).read_text(), name
    model, expected_model = read_folder(folder / "model"), read_folder(expected / "model")
    assert model.keys() == expected_model.keys()
    weights = [name for name in model if name.suffix == ".safetensors"]  # (peft writes its settings in any order)
    assert weights and [str(name) for name in weights if model[name] != expected_model[name]] == []
    assert not list(folder.glob("*.tmp")) and not (folder / "unfinished").exists()


def error_line(ended):
    """The line of a run that ended in an error of the kind that a user can understand."""
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in re.split(r"[\r\n]", ended.stderr) if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


@pytest.mark.parametrize("name", SIBLINGS_BY_TIER)
def test_kill_in_the_second_epoch(name):
    folder = copy_of(killed_run(name))
    ended = finish(name, folder, "--resume")
    assert "after step 4" in ended.stdout
    assert_same(folder, whole_run(name))


HALF = """
def half(tensors, file):
    save_file(tensors, file)
    os.truncate(file, os.path.getsize(file) // 2)
    kill()
"""
# What kills the run, time after time, and the checkpoints that are there then.
KILLS = {
    "before the first checkpoint": [
        ('at(script, "open_folder", 1, kill)', []),
        ('at(script, "evaluate", 1, kill)', []),
        ('at(script, "append_rows", 1, kill, about="metrics.jsonl")', []),
        ('at(optimisation, "clip_grad_norm_", 2, kill)', []),
    ],
    "while a checkpoint is written": [
        (HALF + 'at(script, "save_file", 1, half, about="unfinished")', []),
        ('at(script.os, "replace", 1, kill, about="unfinished")', []),
        (HALF + 'at(script, "save_file", 2, half, about="unfinished")', ["checkpoint-2"]),
        # The second is in its place, and the first is on its way out.
        (
            """
def half(folder, **options):
    if len(list(pathlib.Path(folder).parent.glob("checkpoint-*"))) == 2:
        (pathlib.Path(folder) / "tensors.safetensors").unlink()
        kill()
at(script.shutil, "rmtree", 0, half, about="checkpoint-")
""",
            ["checkpoint-2", "checkpoint-4"],
        ),
    ],
    "while rows are written and at the end": [
        # Step 3 comes after a checkpoint and has an evaluation.
        (
            """
def torn(file, rows):
    if rows[-1]["step"] == 3:
        text = script.json.dumps(rows[0]) + "\\n" + script.json.dumps(rows[-1])
        file.open("a").write(text[: len(text) - 20])
        kill()
at(script, "append_rows", 0, torn, about="samples.jsonl")
""",
            ["checkpoint-2"],
        ),
        (
            """
def torn(file, rows):
    if rows[-1]["step"] == 3:
        file.open("a").write(script.json.dumps(rows[-1])[:100])
        kill()
at(script, "append_rows", 0, torn, about="metrics.jsonl")
""",
            ["checkpoint-2"],
        ),
        ('at(script, "save_model", 1, kill)', ["checkpoint-6"]),
        ('at(script, "replace_file", 1, kill, about="model_outputs.json")', ["checkpoint-6"]),
    ],
}


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_kill_again_and_again(name, when):
    folder, flags = new_folder(), ["--resume", "--save-steps", "2"]
    for patch, kept in KILLS[when]:
        killed = run(name, folder, *flags, patch=patch)
        assert killed.returncode == -signal.SIGKILL, (patch, killed.stderr)
        assert checkpoints(folder) == kept, patch
    finish(name, folder, *flags)
    assert_same(folder, whole_run(name))


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_damaged_checkpoints_are_not_used(name):
    folder = copy_of(killed_run(name))
    damaged = [Path(shutil.copytree(folder / "checkpoint-4", folder / f"checkpoint-{step}")) for step in range(5, 10)]
    for counters in (path / "counters.json" for path in damaged):
        counters.write_text(json.dumps(json.loads(counters.read_text()) | {"step": int(counters.parent.name[-1])}))
    size = (damaged[0] / "tensors.safetensors").stat().st_size
    os.truncate(damaged[0] / "tensors.safetensors", size // 2)
    os.truncate(damaged[1] / "tensors.safetensors", 100)
    os.truncate(damaged[2] / "tensors.safetensors", 0)
    (damaged[3] / "counters.json").unlink()
    (damaged[4] / "counters.json").write_text("")
    (folder / "checkpoint-10").mkdir()
    ended = finish(name, folder, "--resume", "--save-steps", "2")
    assert ended.stdout.count("damaged") == 6
    assert "after step 4" in ended.stdout
    assert_same(folder, whole_run(name))
    assert checkpoints(folder) == ["checkpoint-6"]


@pytest.mark.parametrize("name", SIBLINGS_BY_TIER)
def test_sigterm_saves(name):
    stop_and_go_on(name, "terminate", 143, step=2)


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_interrupt_saves(name):
    stop_and_go_on(name, "interrupt", 130, step=5)


def stop_and_go_on(name, action, status, step):
    folder = new_folder()
    stopped = run(name, folder, patch=f'at(optimisation, "clip_grad_norm_", {step}, {action})')
    assert stopped.returncode == status, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert f"--resume --output-dir {folder}" in stopped.stdout
    assert checkpoints(folder) == [f"checkpoint-{step}"]
    assert not (folder / "model").exists()
    ended = finish(name, folder, "--resume")
    assert f"after step {step}" in ended.stdout
    assert_same(folder, whole_run(name))


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_signals_at_other_moments(name):
    """Before the training there is nothing to save; a second signal does not wait; the last step's is not lost."""
    folder = new_folder()
    stopped = run(name, folder, patch='at(script, "evaluate", 1, terminate)')
    assert (stopped.returncode, checkpoints(folder)) == (143, [])
    assert "Traceback" not in stopped.stderr
    patch = 'at(optimisation, "clip_grad_norm_", 2, lambda *_: (interrupt(), interrupt()))'
    stopped = run(name, folder, "--resume", patch=patch)
    assert (stopped.returncode, checkpoints(folder)) == (130, [])
    stopped = run(name, folder, "--resume", patch='at(optimisation, "clip_grad_norm_", 6, interrupt)')
    assert (stopped.returncode, checkpoints(folder)) == (130, ["checkpoint-6"])
    finish(name, folder, "--resume")
    assert_same(folder, whole_run(name))


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_stored_reference_is_used(name):
    folder = copy_of(killed_run(name))
    files = list(folder.glob("*.safetensors"))
    if not files:
        pytest.skip(f"{name} has no reference")
    for file in files:
        save_file({key: tensor + torch.tensor([10.0, 0.0]) for key, tensor in load_file(file).items()}, file)
    tampered = [file.read_bytes() for file in files]
    finish(name, folder, "--resume")
    assert tampered == [file.read_bytes() for file in files]
    before, after = metrics_of(folder), metrics_of(whole_run(name))
    assert before[:5] == after[:5]
    losses = [[(row.get("train/loss"), row.get("eval/loss")) for row in rows[5:]] for rows in (before, after)]
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_lost_reference_is_that_of_the_initial_model(name):
    folder = copy_of(killed_run(name))
    stored = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    if not stored:
        pytest.skip(f"{name} has no reference")
    for file in stored:
        file.unlink()
    finish(name, folder, "--resume")
    assert stored == {file: file.read_bytes() for file in stored}
    assert_same(folder, whole_run(name))


@pytest.fixture
def small_disk(tmp_path):
    """A small file system; makes itself of the size wanted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", disk]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("no file system can be mounted here")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_small_disk(name, small_disk):
    size = sum(map(len, read_folder(killed_run(name) / "checkpoint-4").values()))
    folder, flags = small_disk(int(1.2 * size)) / "run", ["--resume", "--save-steps", "2"]
    for _ in range(2):  # the second time with the disk as full as it was left
        line = error_line(run(name, folder, *flags))
        assert "No space left" in line and "--resume" in line
        assert checkpoints(folder) == ["checkpoint-2"]
    small_disk(4 * size, "remount")
    ended = finish(name, folder, *flags)
    assert "after step 2" in ended.stdout
    assert_same(folder, whole_run(name))


FULL = {
    "second checkpoint": 'at(script, "save_file", 2, full, about="unfinished")',
    "counters of a checkpoint": """
write_text = pathlib.Path.write_text
def fail_later(file, text):
    write_text(file, text[:5])
    full()
at(pathlib.Path, "write_text", 1, fail_later, about="unfinished")
""",
    "metrics": """
def torn(file, rows):
    file.open("a").write(script.json.dumps(rows[-1])[:100])
    full()
at(script, "append_rows", 2, torn, about="metrics.jsonl")
""",
    "model": 'at(script, "save_model", 1, full)',
    # The tokenizer's own error is a plain exception.
    "tokenizer": """
def full_too(*args, **options):
    raise Exception("No space left on device (os error 28)")
at(script.transformers.PreTrainedTokenizerBase, "save_pretrained", 1, full_too)
""",
    "outputs": 'at(script, "replace_file", 1, full, about="model_outputs.json")',
}


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_full_disk(name):
    """Wherever the disk becomes full, the last checkpoint stays and the run goes on when there is room."""
    folder, flags, kept = new_folder(), ["--resume", "--save-steps", "2"], 0
    for what, patch in FULL.items():
        line = error_line(run(name, folder, *flags, patch=patch))
        assert "No space left" in line and "--resume" in line, what
        assert checkpoints(folder) and int(checkpoints(folder)[-1].removeprefix("checkpoint-")) >= kept, what
        kept = int(checkpoints(folder)[-1].removeprefix("checkpoint-"))
        assert not (folder / "model_outputs.json").exists(), what
    finish(name, folder, *flags)
    assert_same(folder, whole_run(name))


@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_a_loss_that_is_not_finite_stops_the_run(name):
    folder = copy_of(killed_run(name))
    file = folder / "checkpoint-4" / "tensors.safetensors"
    tensors = load_file(file)
    next(tensors[key] for key in sorted(tensors) if key.endswith("up_proj.weight"))[0, 0] = torch.nan
    save_file(tensors, file)
    before = read_folder(folder / "checkpoint-4")
    line = error_line(run(name, folder, "--resume", "--save-steps", "1"))
    assert line.startswith("error: step 5: ")
    rows = set(map(int, re.search(r"rows \[(.*?)\]", line)[1].split(", ")))
    args = load_script(name).Args(num_train_epochs=2, batch_size=8)
    if hasattr(load_script(name), "plan_batches"):
        assert rows == set(load_script(name).plan_batches(args, list(range(20)))[4])
    assert rows and rows <= set(range(20))
    assert read_folder(folder / "checkpoint-4") == before
    assert checkpoints(folder) == ["checkpoint-4"]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert not (folder / "model").exists()
