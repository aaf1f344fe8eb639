"""Runs on a GPU, where there is one: the other tests hide it."""

import json
import shutil

import pytest
from conftest import DPO_AND_SLOWLY_THE_OTHERS, finish, read_rows
from test_runs import check_mixed_precision, flags_of, run_killed

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("name", DPO_AND_SLOWLY_THE_OTHERS)
def test_a_run(name, data, tmp_path):
    """In bfloat16, the default there: the first numbers are exact, and the run ends well."""
    flags = {"rlhf_ppo": ["--ppo-epochs", "1"], "grpo": ["--num-iterations", "1"]}.get(name, [])
    finish(name, tmp_path / "run", *flags_of(name, data), *flags, gpu="0")
    check_mixed_precision(name, read_rows(tmp_path / "run" / "metrics.jsonl"))


def test_lora_with_checkpointing(data, tmp_path):
    flags = ["--lora-rank", "4", "--gradient-checkpointing"]
    finish("dpo", tmp_path / "run", *flags_of("dpo", data), *flags, gpu="0")
    assert json.loads((tmp_path / "run/args.json").read_text())["args"]["dtype"] == "bfloat16"  # so it saw the GPU
    check_mixed_precision("dpo", read_rows(tmp_path / "run" / "metrics.jsonl"))


def test_float32_gives_what_a_cpu_gives(data, tmp_path):
    flags = [*flags_of("dpo", data), "--dtype", "float32"]
    for folder, gpu in (("cpu", ""), ("gpu", "0")):
        finish("dpo", tmp_path / folder, *flags, gpu=gpu)
    rows, expected = (read_rows(tmp_path / folder / "metrics.jsonl") for folder in ("gpu", "cpu"))
    for row, other in zip(rows, expected, strict=True):
        for metric in {"train/loss", "train/grad_norm", "eval/loss"} & set(other):
            assert row[metric] == pytest.approx(other[metric], rel=1e-4)


def test_killed_run_goes_on(data, tmp_path):
    """Up to rounding: the order of some sums on a GPU is not fixed."""
    flags = [*flags_of("dpo", data), "--save-steps", "2"]
    finish("dpo", tmp_path / "whole", *flags, gpu="0")
    run_killed("dpo", tmp_path / "killed", *flags, at=4, gpu="0")
    finish("dpo", tmp_path / "killed", *flags, "--resume", gpu="0")
    rows, expected = (read_rows(tmp_path / folder / "metrics.jsonl") for folder in ("killed", "whole"))
    for row, other in zip(rows[1:], expected[1:], strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
