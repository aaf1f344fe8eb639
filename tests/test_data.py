"""From rows to pairs of token ids, and from pairs to the batches of each step and device."""

import json
import os
import re
from dataclasses import replace

import pytest
import tokenizers
import torch
from conftest import TOY, chat, load_script, start
from transformers import LlamaTokenizer

dpo = load_script("dpo")

FORMS = {
    "text": {"prompt": "Review it.", "chosen": "good", "rejected": "bad<|end|> and more"},
    "messages": {"prompt": chat("a"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
    "conversations": {"chosen": chat("a", "b"), "rejected": chat("a", "c")},
    "UltraFeedback": {"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c")},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """Each answer ends with the stop token, once."""
    run = start("dpo", TOY / "policy")
    (pair,) = dpo.encode_rows(run, [FORMS[form] | {"preference_prob": 0.7}], "train")
    texts = run.tokenizer.batch_decode([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
    if form == "text":
        assert texts == ["Review it.", "good<|end|>", "bad<|end|>"] and pair.prompt == "Review it."
    else:
        assert texts == ["<|user|>a<|assistant|>", "b<|end|>", "c<|end|>"] and pair.prompt == chat("a")
    assert pair.preference_prob == 0.7


def test_sentencepiece_puts_no_space_before_an_answer():
    """Prompt and answer have the tokens of the whole text; an answer by itself would start as if after a space."""
    names, merges = ["<unk>", "<s>", "</s>", "\n", *"▁Hiok", "Hi", "▁Hi", "ok", "▁ok"], ["H i", "▁ Hi", "o k", "▁ ok"]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])
    run = replace(start("dpo", TOY / "policy"), tokenizer=tokenizer, stop_ids=[2])
    (pair,) = dpo.encode_rows(run, [{"prompt": "ok\n", "chosen": "Hi", "rejected": "ok"}], "train")
    whole = tokenizer("ok\nHi</s>", add_special_tokens=False).input_ids
    assert pair.prompt_ids + pair.chosen_ids == whole
    assert tokenizer("Hi</s>", add_special_tokens=False).input_ids != pair.chosen_ids


def test_a_bos_comes_before_a_text_once():
    run, special = start("dpo", TOY / "policy"), "<|system|>"
    run.tokenizer.bos_token, number = special, run.tokenizer.convert_tokens_to_ids(special)
    template = {"single": f"{special} $A", "special_tokens": [(special, number)]}
    run.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template)
    for prompt in ("a", f"{special}a"):
        (pair,) = dpo.encode_rows(run, [FORMS["text"] | {"prompt": prompt}], "train")
        assert run.tokenizer.decode(pair.prompt_ids) == f"{special}a"


def test_a_template_that_changes_an_answered_prompt_ends_the_run():
    run = start("dpo", TOY / "policy")
    run.tokenizer.chat_template = "{{ messages | length }}" + run.tokenizer.chat_template
    with pytest.raises(SystemExit, match="error: the tokenizer's chat template renders a prompt differently"):
        dpo.encode_rows(run, [FORMS["messages"]], "train")


def test_a_template_may_write_the_date():
    """The prompts of a resumed run then differ, which is allowed: --resume compares the repr of the pairs."""
    run, pairs = start("dpo", TOY / "policy"), []
    template = run.tokenizer.chat_template
    for day in ("Monday", "Tuesday"):
        run.tokenizer.chat_template = day + template
        pairs.append(dpo.encode_rows(run, [FORMS["messages"]], "train"))
    assert pairs[0] != pairs[1] and repr(pairs[0]) == repr(pairs[1])


BAD_ROWS = {
    "needs full prompt, chosen, rejected": {"prompt": "a", "chosen": 7, "rejected": "c"},
    "has ['question']": {"question": "a"},
    "has ['prompt', 'rejected']": {"prompt": "a", "chosen": "", "rejected": "c"},
    "preference_prob is 1.5": {"prompt": "a", "chosen": "b", "rejected": "c", "preference_prob": 1.5},
    "preference_prob is '0.7'": {"prompt": "a", "chosen": "b", "rejected": "c", "preference_prob": "0.7"},
}


@pytest.mark.parametrize("message", list(BAD_ROWS))
def test_bad_rows_end_the_run(message):
    run = start("dpo", TOY / "policy")
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(SystemExit, match="^error: row 1 of split train") as error:
        dpo.encode_rows(run, [good, BAD_ROWS[message]], "train")
    assert message in str(error.value)


def test_long_and_equal_pairs_are_dropped():
    run = start("dpo", TOY / "policy", max_length=12)  # six tokens of the prompt, five of an answer, and its stop token
    rows = [{"prompt": "a a a a a a", "chosen": " ".join("b" * n), "rejected": "c"} for n in (1, 5, 6)]
    rows += [{"prompt": "a", "chosen": "c", "rejected": " ".join("b" * 11)}]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}]
    assert [pair.row for pair in dpo.encode_rows(run, rows, "train")] == [0, 1]


def test_file_without_a_test_split(tmp_path):
    """The last tenth of the pairs is kept for testing; a file whose rows change but not its time is read anew."""
    file, lines = tmp_path / "pairs.csv", [f'"Review, the {i}.",good {i},bad,0.9' for i in range(40)]
    for count, kept in ((40, 36), (20, 18)):
        file.write_text("\n".join(["prompt,chosen,rejected,preference_prob", *lines[:count]]))
        os.utime(file, (1e9, 1e9))
        train_pairs, test_pairs = dpo.load_pairs(start("dpo", TOY / "policy", dataset_name=str(file)))
        assert [pair.row for pair in train_pairs] == list(range(kept))
        assert [pair.row for pair in test_pairs] == list(range(kept, count))
    assert (train_pairs[3].prompt, train_pairs[3].preference_prob) == ("Review, the 3.", 0.9)
    with pytest.raises(KeyError, match="mistyped"):
        dpo.load_pairs(start("dpo", TOY / "policy", dataset_name=str(file), dataset_test_split="mistyped"))


def test_a_json_list_may_have_values_of_several_types(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([FORMS["text"] | {"note": note} for note in ("a", 7, "b")]))
    train_pairs, _ = dpo.load_pairs(start("dpo", TOY / "policy", dataset_name=str(tmp_path / "rows.json")))
    assert [pair.columns["note"] for pair in train_pairs] == ["a", 7]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches(world_size):
    """Every row once, equally many groups on each process, all of about the wanted size."""
    lengths = torch.randint(1, 60, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    plans = [dpo.micro_batches(lengths, 100, rank, world_size) for rank in range(world_size)]
    groups = sum(plans, [])
    assert sorted(sum(groups, [])) == list(range(60))
    assert len({len(plan) for plan in plans}) == 1
    totals = [sum(lengths[i] for i in group) for group in groups]
    assert max(totals) <= 100 + max(lengths) and max(totals) - min(totals) <= max(lengths)
    for same_round in zip(*plans, strict=True):  # FSDP needs equally many passes on each process
        assert len({len(group) for group in same_round}) == 1


@pytest.mark.parametrize("lengths, tokens", [([500, 400], 100), ([7], 1000), ([], 10)])
def test_micro_batches_of_few_rows(lengths, tokens):
    assert sorted(sum(dpo.micro_batches(lengths, tokens, 0, 1), [])) == list(range(len(lengths)))


def test_batches_leave_out_other_pairs_in_each_epoch(monkeypatch):
    monkeypatch.setattr(dpo, "WORLD_SIZE", 4)
    batches = dpo.plan_batches(dpo.Args(batch_size=8, num_train_epochs=2), 19)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    assert all(len(set(sum(epoch, []))) == 16 for epoch in (batches[:2], batches[2:]))
    assert set(sum(batches[:2], [])) != set(sum(batches[2:], []))
    assert dpo.plan_batches(dpo.Args(batch_size=8, num_train_epochs=2, seed=2), 19) != batches
    batches = dpo.plan_batches(dpo.Args(batch_size=8), 21)  # a last step with at least a pair for each device is taken
    assert [len(batch) for batch in batches] == [8, 8, 5]


def test_steps_of_fewer_pairs_than_devices_end_the_run(monkeypatch, data):
    run = start("dpo", TOY / "policy", dataset_name=str(data), batch_size=3)
    monkeypatch.setattr(dpo, "WORLD_SIZE", 4)
    with pytest.raises(SystemExit, match="error: there are too few pairs .* in a step .devices: 4"):
        dpo.load_pairs(run)


def test_files_that_are_missing_or_empty_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.jsonl", "mistyped.csv"):
        with pytest.raises(SystemExit, match=f"error: there is no file .*{name}, or it is empty"):
            dpo.load_pairs(start("dpo", TOY / "policy", dataset_name=str(tmp_path / name)))


def test_an_answer_may_call_a_tool_instead_of_saying_something():
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    row = {"prompt": chat("a"), "chosen": call, "rejected": chat("a", "b")[1:]}
    assert dpo.split_row(row, "row 0")[1] == call
    with pytest.raises(SystemExit, match="^error: row 0 needs full prompt"):
        dpo.split_row(row | {"chosen": [{"role": "assistant", "content": None}]}, "row 0")


@pytest.mark.parametrize(
    "name, flag, value",
    [("dpo", "beta", -1.0), ("dpo", "label_smoothing", 2.0), ("dpo", "lora_rank", -1), ("dpo", "beta", float("nan"))]
    + [("dpo", flag, 0) for flag in ("batch_size", "eval_steps", "max_new_tokens", "micro_batch_tokens")]
    + [("spin", "beta", [0.1, -1.0]), ("rlhf_ppo", "ppo_epochs", 0), ("grpo", "num_iterations", 0)]
    + [("dpo", "max_length", 1025)],  # the test bed's model has 1,024 positions
)  # fmt: skip
def test_flags_out_of_range(name, flag, value):
    with pytest.raises(SystemExit, match=re.escape(f"error: --{flag.replace('_', '-')} {value} is not from")):
        start(name, TOY / "policy", **{flag: value})
