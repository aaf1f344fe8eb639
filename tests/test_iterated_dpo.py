"""docs/iterated_dpo.py: pairs of the policy's own answers, round by round."""

import json

from conftest import ROOT, read_rows, run_script

LENGTH = "def reward(prompts, completions, **_): return [len(completion[0]['content']) for completion in completions]"


def test_two_rounds(data, tmp_path):
    """The longer answers are chosen, no prompt is in two rounds, the second starts from the first's model."""
    (tmp_path / "judge.py").write_text(LENGTH)
    flags = ["--dataset-name", data, "--judge-name-or-path", tmp_path / "judge.py", "--output-dir", tmp_path / "run"]
    flags += ["--num-answers", "3", "--batch-size", "4", "--num-eval-prompts", "8", "--max-new-tokens", "48"]
    ended = run_script(ROOT / "docs/iterated_dpo.py", *flags)
    assert ended.returncode == 0, ended.stderr[-3000:]
    prompts = []
    for number in (1, 2):
        pairs = read_rows(tmp_path / f"run/pairs-{number}/train.jsonl")
        lengths = [[len(pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in pairs]
        assert pairs and all(chosen > rejected > 0 for chosen, rejected in lengths)
        prompts += [json.dumps(pair["prompt"]) for pair in pairs]
        first = read_rows(tmp_path / f"run/{number}/metrics.jsonl")[0]
        assert first["eval/kl"] == first["eval/rewards/margins"] == 0
    assert set(prompts) <= {json.dumps(row["prompt"]) for row in read_rows(data / "train.jsonl")}
    assert len(set(prompts)) == len(prompts)
    args = json.loads((tmp_path / "run/2/args.json").read_text())["args"]
    assert args["model_name_or_path"] == str(tmp_path / "run/1/model")
