"""Bad input ends a run with one line that begins with `error:`, and overwrites nothing."""

import json
import math
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, load_script, read_folder, read_rows, run_script, text_pairs, write_rows
from safetensors.torch import load_file, save_file

dpo = load_script("pre_dpo")

ROWS = text_pairs(12)
MISSING = "some-owner/no-such-thing"


@pytest.fixture
def flags(tiny_model, tmp_path):
    """Flags of a run on tiny things that goes well."""
    return {
        "model_name_or_path": tiny_model("llama-untied"),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", ROWS),
        "judge_name_or_path": None,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "max_new_tokens": 1,
        "max_length": 200,
        "num_eval_prompts": 2,
    }


def error_of(**flags):
    """The line with which a run ends."""
    with pytest.raises(SystemExit) as caught:
        dpo.main(dpo.Args(**flags))
    message = caught.value.code  # a text makes python print it on stderr and exit with status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert len(message) < 600 and "Traceback" not in message
    return message


def assert_error(flags, *words, written=False):
    message = error_of(**flags)
    assert not [word for word in words if word not in message], message
    assert (dpo.Path(flags["output_dir"]) / "args.json").exists() == written, message


# === Files ===


def test_the_flags_that_the_others_change_go_well(flags):
    dpo.main(dpo.Args(**flags))


@pytest.mark.parametrize("flag", ["dataset_name", "model_name_or_path", "judge_name_or_path"])
def test_no_such_file(flags, tmp_path, flag):
    path = str(tmp_path / "no-such-thing")
    assert_error(flags | {flag: path}, path, "--" + flag.replace("_", "-"), "no such file")


@pytest.mark.parametrize("flag", ["eval_prompts", "chat_template", "dataset_name"])
def test_no_such_relative_file(flags, flag):
    assert_error(
        flags | {flag: "no-such-thing.json"}, "no-such-thing.json", "--" + flag.replace("_", "-"), "no such file"
    )


@pytest.mark.parametrize("flag", ["dataset_name", "model_name_or_path"])
def test_no_such_thing_on_the_hub(flags, flag):
    assert_error(flags | {flag: MISSING}, MISSING)


def test_no_such_judge_on_the_hub(flags):
    assert_error(flags | {"judge_name_or_path": MISSING}, MISSING, written=True)


def test_folder_without_a_model(flags, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_error(flags | {"model_name_or_path": str(tmp_path / "empty")}, str(tmp_path / "empty"))


def test_unknown_file_type(flags, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n")
    assert_error(flags | {"dataset_name": str(tmp_path / "rows.csv")}, "rows.csv", ".jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_malformed_json(flags, tmp_path, name):
    lines = [json.dumps(row) for row in ROWS]
    lines[6] = lines[6][:-9]
    text = "\n".join(lines) if name == "rows.jsonl" else "[" + ",\n".join(lines) + "]"
    (tmp_path / name).write_text(text)
    assert_error(flags | {"dataset_name": str(tmp_path / name)}, name, "line 7", "malformed JSON")


def test_text_in_another_encoding(flags, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROWS[0]).replace("review", "Überblick").encode("latin-1"))
    assert_error(flags | {"dataset_name": str(tmp_path / "rows.jsonl")}, "rows.jsonl", "utf-8")


def test_damaged_parquet_file(flags, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no table")
    assert_error(flags | {"dataset_name": str(tmp_path / "rows.parquet")}, "rows.parquet")


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_empty_file(flags, tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    assert_error(flags | {"dataset_name": str(tmp_path / "rows.jsonl")}, "rows.jsonl", "no pair is left to train on")


def test_unknown_split(flags, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    flags |= {"dataset_name": str(tmp_path / "data"), "dataset_train_split": "training"}
    assert_error(flags, "data", "'training'", "--dataset-train-split")


# === Rows ===


def bad_row(flags, tmp_path, row, *words, number=3, count=12):
    rows = [*ROWS[:number], row, *ROWS[number + 1 : count]]
    flags |= {"dataset_name": write_rows(tmp_path / "bad.jsonl", rows)}
    assert_error(flags, "bad.jsonl", f"row {number}", *words)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": "b"},
        {"prompt": "a", "chosen": "b"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": 5, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": ["c"]},
        {"prompt": "a", "chosen": ["b"], "rejected": ["c"]},
        {"prompt": "a", "chosen": [], "rejected": []},
        {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [{"role": "assistant", "content": "c"}]},
        {"prompt": [{"role": "user", "content": None}], "chosen": [], "rejected": []},
        {"prompt": None, "chosen": None, "rejected": None},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "user", "content": "a"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        },
    ],
    ids=str,
)
def test_rows_in_no_accepted_form(flags, tmp_path, row):
    bad_row(flags, tmp_path, row, "accepted forms", *(f"'{key}'" for key in row), "`prompt`, `chosen` and `rejected`")


@pytest.mark.parametrize("row", [5, "text", None])
def test_rows_that_are_no_objects(flags, tmp_path, row):
    bad_row(flags, tmp_path, row, "JSON object")


def test_bad_row_among_those_kept_for_the_test(flags, tmp_path):
    bad_row(flags, tmp_path, {"question": "a"}, "accepted forms", number=11)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_empty_prompt_or_completion(flags, tmp_path, name):
    bad_row(flags, tmp_path, ROWS[3] | {name: " \n"}, "empty")


@pytest.mark.parametrize("prob", [-0.1, 1.1, math.nan, "0.5", [1]])
def test_preference_prob(flags, tmp_path, prob):
    bad_row(flags, tmp_path, ROWS[3] | {"preference_prob": prob}, "preference_prob", "0", "1")


def test_all_completions_equal(flags, tmp_path, capsys):
    rows = [row | {"rejected": row["chosen"]} for row in ROWS]
    path = write_rows(tmp_path / "equal.jsonl", rows)
    assert_error(flags | {"dataset_name": path}, "equal.jsonl", "no pair is left to train on")
    assert "12 dropped for having chosen = rejected" in capsys.readouterr().out


def test_some_completions_equal(flags, tmp_path, capsys):
    path = write_rows(tmp_path / "equal.jsonl", [ROWS[0] | {"rejected": ROWS[0]["chosen"]}, *ROWS[1:]])
    dpo.main(dpo.Args(**flags | {"dataset_name": path}))
    assert "1 dropped for having chosen = rejected" in capsys.readouterr().out


def test_nothing_left(flags):
    assert_error(flags | {"max_length": 3}, "rows.jsonl", "no pair is left to train on")


@pytest.mark.parametrize(
    "row", [{"question": "a"}, {"prompt": ""}, {"instruction": 5}, {"prompt": [1]}, {"prompt": [{"role": "user"}]}]
)
def test_eval_prompts(flags, tmp_path, row):
    path = write_rows(tmp_path / "prompts.jsonl", [{"instruction": "a"}, row])
    assert_error(flags | {"eval_prompts": path}, "prompts.jsonl", "row 1", "`instruction`")
    assert_error(flags | {"eval_prompts": write_rows(tmp_path / "none.jsonl", [])}, "none.jsonl", "no rows")


# === Models ===


def test_chat_data_without_a_chat_template(flags, tiny_copy, tmp_path):
    folder = tiny_copy("llama-untied")
    (folder / "chat_template.jinja").unlink()
    chat = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    path = write_rows(tmp_path / "chat.jsonl", [chat | {"prompt": "a"}] * 12)
    flags |= {"model_name_or_path": str(folder), "dataset_name": path}
    assert_error(flags, "chat template", "--chat-template", str(folder))


def test_chat_template_that_changes_the_prompt_with_the_answer(flags, tmp_path):
    (tmp_path / "template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    chat = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    path = write_rows(tmp_path / "chat.jsonl", [chat | {"prompt": "a"}] * 12)
    assert_error(flags | {"dataset_name": path, "chat_template": str(tmp_path / "template.jinja")}, "--chat-template")


def test_malformed_chat_template(flags, tmp_path):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    chat = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    path = write_rows(tmp_path / "chat.jsonl", [chat | {"prompt": "a"}] * 12)
    assert_error(flags | {"dataset_name": path, "chat_template": str(tmp_path / "template.jinja")}, "template")


def test_chat_template_that_refuses_a_row(flags, tmp_path):
    """As some do with a system message."""
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    (tmp_path / "template.jinja").write_text(refuse + "{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    rows = [chat | {"prompt": [{"role": role, "content": "a"}]} for role in ["user"] * 4 + ["system"] * 8]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    flags |= {"dataset_name": path, "chat_template": str(tmp_path / "template.jinja")}
    assert_error(flags, "template", "no system messages")


def test_tokenizer_without_end(flags, tiny_copy):
    folder = tiny_copy("llama-untied")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    assert_error(flags | {"model_name_or_path": str(folder)}, str(folder), "end-of-sequence")


def test_model_that_sees_later_tokens(flags, tiny_model):
    path = tiny_model("bert")
    assert_error(flags | {"model_name_or_path": path}, path, "no causal language model")


def test_model_with_an_encoder(flags, tiny_copy):
    folder = tiny_copy("llama-untied")
    transformers.T5Config(d_model=32, num_layers=1).save_pretrained(folder)
    assert_error(flags | {"model_name_or_path": str(folder)}, str(folder), "T5Config")


def test_model_without_a_head(flags, tiny_model):
    path = tiny_model("llama-untied", "SequenceClassification", num_labels=1)
    assert_error(flags | {"model_name_or_path": path}, path, "lm_head", "no causal language model")


def test_damaged_weights(flags, tiny_copy):
    folder = tiny_copy("llama-untied")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert_error(flags | {"model_name_or_path": str(folder)}, str(folder))


def test_weights_of_another_shape(flags, tiny_copy):
    folder = tiny_copy("llama-untied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 52}))
    assert_error(flags | {"model_name_or_path": str(folder)}, str(folder))


def test_tokenizer_with_more_tokens_than_the_model(flags, tiny_model):
    path = tiny_model("llama-untied", vocab_size=300)
    assert_error(flags | {"model_name_or_path": path}, path, "900 tokens")


@pytest.mark.parametrize("flag", ["model_name_or_path", "judge_name_or_path"])
def test_remote_code_is_not_run(flags, tiny_copy, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("builtins.input", lambda _: "y")  # what transformers would ask for
    folder = tiny_copy("llama-untied", *["SequenceClassification"] * (flag == "judge_name_or_path"))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    names["AutoModelForSequenceClassification"] = "code.Model"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    assert_error(flags | {flag: str(folder)}, str(folder), written=flag == "judge_name_or_path")
    assert not (tmp_path / "it ran").exists()


def test_weights_in_a_pickle_are_not_read(flags, tiny_copy):
    folder = tiny_copy("llama-untied")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_error(flags | {"model_name_or_path": str(folder)}, str(folder), "model.safetensors")


@pytest.mark.parametrize("judge", [("llama-untied", "SequenceClassification"), ("llama", "CausalLM")])
def test_judge_that_gives_no_single_score(flags, tiny_model, judge):
    path = tiny_model(*judge, **{"num_labels": 2} if judge[1] == "SequenceClassification" else {})
    word = "2 outputs" if judge[1] == "SequenceClassification" else "no score head"
    assert_error(flags | {"judge_name_or_path": path}, path, word, "one output", written=True)


def test_the_test_bed_s_judge_on_another_model(flags):
    del flags["judge_name_or_path"]
    assert_error(flags, "--judge-name-or-path")


def test_prompt_and_response_beyond_the_positions(flags, tiny_model, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a b c " * 340}])
    flags |= {"model_name_or_path": tiny_model("gpt2"), "eval_prompts": path, "max_new_tokens": 50}
    assert_error(flags, "1024 positions")


@pytest.mark.parametrize("flag, value", [("max_new_tokens", 1024), ("max_length", 1025)])
def test_more_tokens_than_positions(flags, flag, value):
    assert_error(flags | {flag: value}, "--" + flag.replace("_", "-"), "1024 positions")


# === Flags ===


@pytest.mark.parametrize(
    "flag, values",
    {
        "seed": [-1, 10**19],
        "max_steps": [-2],
        "beta": [0, -1, math.nan, math.inf],
        "label_smoothing": [-0.1, 0.6, math.nan],
        "learning_rate": [-1e-6, math.nan, math.inf],
        "batch_size": [0, -8],
        "micro_batch_tokens": [-1],
        "max_length": [0],
        "num_train_epochs": [0],
        "warmup_ratio": [-0.1, 1.1, math.nan],
        "weight_decay": [-0.1, math.nan],
        "max_grad_norm": [0, math.nan],
        "eval_steps": [0],
        "num_eval_prompts": [0],
        "max_new_tokens": [0],
        "lora_rank": [-1],
        "logging_steps": [0],
        "save_steps": [-1],
    }.items(),
)
def test_flags_out_of_range(flags, flag, values):
    for value in values:
        assert_error(flags | {flag: value}, f"--{flag.replace('_', '-')} ", f"not {value}")


def test_more_devices_than_pairs(monkeypatch):
    monkeypatch.setattr(dpo, "WORLD_SIZE", 16)
    with pytest.raises(SystemExit, match="error: --batch-size 8 .*16 devices"):
        dpo.check_args(dpo.Args(batch_size=8))


def test_full_memory_and_full_disk():
    with pytest.raises(SystemExit, match="error: .*--micro-batch-tokens"), dpo.readable_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(SystemExit, match="error: .*No space left.*checkpoint.*--resume"), dpo.readable_errors():
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="something else"), dpo.readable_errors():
        raise OSError("something else")


# === A run's folder ===


def test_folder_of_another_run(flags, capsys):
    dpo.main(dpo.Args(**flags))
    folder = dpo.Path(flags["output_dir"])
    before = read_folder(folder)
    assert_error(flags, str(folder), "--resume", "--output-dir", written=True)
    changes = {"beta": 0.2, "learning_rate": 1e-3, "seed": 2, "batch_size": 32, "max_steps": 2}
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        assert_error(flags | {"resume": True, name: value}, flag, str(value), str(folder), written=True)
    assert read_folder(folder) == before


def test_resume_without_a_folder(flags):
    flags |= {"resume": True, "output_dir": None}
    assert "--output-dir" in error_of(**flags)


def test_folder_that_cannot_be_made(flags, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(path) in error_of(**flags | {"output_dir": str(path)})


# === Losses that are not finite ===


@pytest.fixture
def spoilt(flags, tiny_copy, tmp_path):
    """Flags of a run in which one word makes the policy fail, which only the rows 2 and 5 have."""
    folder = tiny_copy("llama-untied")
    tensors = load_file(folder / "model.safetensors")
    (word,) = transformers.AutoTokenizer.from_pretrained(folder)("~", add_special_tokens=False).input_ids
    tensors["model.embed_tokens.weight"][word] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows = [row | {"chosen": row["chosen"] + " ~"} if i in (2, 5) else row for i, row in enumerate(ROWS)]
    return flags | {"model_name_or_path": str(folder), "dataset_name": write_rows(tmp_path / "spoilt.jsonl", rows)}


def test_loss_that_is_not_finite_stops_before_the_update(spoilt, monkeypatch):
    policies, load_policy = [], dpo.load_policy
    monkeypatch.setattr(dpo, "load_policy", lambda *args: policies.append(load_policy(*args)) or policies[0])
    assert_error(spoilt, "step 1", "2", "5", "not finite", written=True)
    folder = dpo.Path(spoilt["output_dir"])
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0]
    assert not (folder / "model").exists()
    initial = load_file(dpo.Path(spoilt["model_name_or_path"]) / "model.safetensors")
    for name, weight in policies[0].named_parameters():
        torch.testing.assert_close(weight.detach(), initial[name], rtol=0, atol=0, equal_nan=True)


def test_checkpoint_is_kept_where_a_loss_is_not_finite(spoilt):
    pairs = [dpo.Pair(i, "", [], [], []) for i in range(11)]
    for seed in range(100):  # one with which the bad rows come late
        batches = [[p.row for p in batch] for batch in dpo.plan_batches(dpo.Args(seed=seed, batch_size=3), pairs)]
        if not {2, 5} & {*batches[0], *batches[1]}:
            break
    bad = next(number for number, batch in enumerate(batches, 1) if {2, 5} & {*batch})
    spoilt |= {"seed": seed, "batch_size": 3, "max_steps": -1, "save_steps": 1}
    assert_error(spoilt, f"step {bad}", "not finite", written=True)
    folder = dpo.Path(spoilt["output_dir"])
    kept = load_file(folder / f"checkpoint-{bad - 1}" / "tensors.safetensors")
    assert not (folder / f"checkpoint-{bad}").exists()
    weights = kept["policy.lm_head.weight"]
    assert weights.isfinite().all() and not torch.equal(
        weights, load_file(dpo.Path(spoilt["model_name_or_path"]) / "model.safetensors")["lm_head.weight"]
    )


def test_weights_that_overflow(flags):
    """In an update from which an evaluation follows."""
    flags |= {"learning_rate": 1e9, "lr_scheduler_type": "constant", "max_new_tokens": 4}
    assert_error(flags, "finite", written=True)


# === What the shell sees ===


def test_exit_status(flags, tmp_path):
    result = run_script(
        ROOT / "pre_dpo.py", "--dataset-name", tmp_path / "none.jsonl", "--output-dir", tmp_path / "run"
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "none.jsonl" in result.stderr


def test_exit_status_of_unknown_flags(tmp_path):
    result = run_script(ROOT / "pre_dpo.py", "--bata", "0.1", "--output-dir", tmp_path / "run")
    assert result.returncode == 2 and "--bata" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_exit_status_in_the_middle_of_a_run(spoilt):
    shutil.rmtree(spoilt["output_dir"], ignore_errors=True)
    words = [word for name, value in spoilt.items() for word in ("--" + name.replace("_", "-"), str(value))]
    result = run_script(ROOT / "pre_dpo.py", *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: step 1")
