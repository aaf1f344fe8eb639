"""From rows to token ids, and from pairs to batches."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import TOY, load_script, write_rows
from pyarrow import Table, parquet
from tokenizers.processors import TemplateProcessing

dpo = load_script("pre_dpo")

END = 0  # id of the tokenizer's <|end|>
QUESTION, GOOD, BAD = "Which hotel?", "The great one.", "I do not know."
SILENT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
SILENT_TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # writes no stop token


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def tokenizer():
    return copy.deepcopy(transformers.AutoTokenizer.from_pretrained(TOY / "policy"))


@pytest.fixture
def encode(tokenizer, tmp_path):
    """Encodes rows with this test's tokenizer; encode.stop_ids are those of the model."""

    def run(rows, **flags):
        args = dpo.Args(**flags)
        settings = {"device": torch.device("cpu"), "dtype": torch.float32, "micro_batch_tokens": 2048}
        return dpo.encode_rows(
            dpo.Run(args, tmp_path, tokenizer=tokenizer, stop_ids=run.stop_ids, **settings), rows, "rows"
        )

    run.stop_ids = [END]
    return run


def ids_of(pair):
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def add_bos(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    special = [("<|start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=special)


# === Row forms ===


CHAT_FORMS = {
    "messages": {"prompt": [user(QUESTION)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "conversations": {"chosen": [user(QUESTION), assistant(GOOD)], "rejected": [user(QUESTION), assistant(BAD)]},
    "HH text": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
    "UltraFeedback": {
        "prompt": QUESTION,
        "chosen": [user(QUESTION), assistant(GOOD)],
        "rejected": [user(QUESTION), assistant(BAD)],
    },
    "prompt in both": {
        "prompt": [user(QUESTION)],
        "chosen": [user(QUESTION), assistant(GOOD)],
        "rejected": [user(QUESTION), assistant(BAD)],
    },
}


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_chat_forms(encode, tokenizer, form):
    (pair,) = encode([CHAT_FORMS[form]])
    assert tokenizer.decode(pair.prompt_ids) == f"<|user|>{QUESTION}<|assistant|>"
    assert tokenizer.decode(pair.chosen_ids) == f"{GOOD}<|end|>"
    assert tokenizer.decode(pair.rejected_ids) == f"{BAD}<|end|>"
    assert pair.prompt == [user(QUESTION)] and pair.preference_prob == 1.0 and pair.row == 0


def test_strings(encode, tokenizer):
    row = {"prompt": QUESTION, "chosen": " " + GOOD, "rejected": " " + BAD}
    (pair,) = encode([row | {"preference_prob": 0.25, "unused": [1]}])
    texts = (QUESTION, f" {GOOD}<|end|>", f" {BAD}<|end|>")
    assert ids_of(pair) == tuple(tokenizer(text).input_ids for text in texts)
    assert pair.preference_prob == 0.25 and pair.prompt == QUESTION


def test_conversations_of_many_turns(encode, tokenizer):
    history = [{"role": "system", "content": "Be brief."}, user("Hello"), assistant("Hi"), user(QUESTION)]
    with_prompt = {"prompt": history, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    without = {"chosen": [*history, assistant(GOOD)], "rejected": [*history, assistant(BAD)]}
    text = f"\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: {QUESTION}\n\nAssistant: "
    first, second, hh = encode([with_prompt, without, {"chosen": text + GOOD, "rejected": text + BAD}])
    assert ids_of(first) == ids_of(second)
    head = f"<|user|>Hello<|assistant|>Hi<|end|><|user|>{QUESTION}<|assistant|>"
    assert tokenizer.decode(first.prompt_ids) == "<|system|>Be brief." + head
    assert tokenizer.decode(hh.prompt_ids) == head and ids_of(hh)[1:] == ids_of(first)[1:]


def test_answers_that_begin_alike_share_no_more_than_the_prompt(encode, tokenizer):
    text = f"\n\nHuman: {QUESTION}\n\nAssistant: The great "
    (pair,) = encode([{"chosen": text + "one.", "rejected": text + "two."}])
    assert tokenizer.decode(pair.prompt_ids) == f"<|user|>{QUESTION}<|assistant|>"
    assert tokenizer.decode(pair.chosen_ids) == "The great one.<|end|>"
    assert tokenizer.decode(pair.rejected_ids) == "The great two.<|end|>"


def test_hh_text_stays_text_without_a_chat_template(encode, tokenizer):
    tokenizer.chat_template = None
    (pair,) = encode([CHAT_FORMS["HH text"]])
    assert tokenizer.decode(pair.prompt_ids) == f"\n\nHuman: {QUESTION}\n\nAssistant:"
    assert tokenizer.decode(pair.chosen_ids) == f" {GOOD}<|end|>"
    prompt = f"\n\nHuman: {QUESTION}\n\nAssistant:"
    assert [ids_of(pair)] == [
        ids_of(p) for p in encode([{"prompt": prompt, "chosen": " " + GOOD, "rejected": " " + BAD}])
    ]


# === Beginning and end ===


def test_bos_once_before_strings(encode, tokenizer):
    add_bos(tokenizer)
    rows = [{"prompt": prompt, "chosen": GOOD, "rejected": BAD} for prompt in (QUESTION, "<|start|>" + QUESTION)]
    first, second = encode(rows)
    assert ids_of(first) == ids_of(second)
    bos = tokenizer.bos_token_id
    assert first.prompt_ids[0] == bos and sum(ids.count(bos) for ids in ids_of(first)) == 1


def test_bos_of_chats_is_the_template_s(encode, tokenizer):
    add_bos(tokenizer)
    (without,) = encode([CHAT_FORMS["messages"]])
    assert tokenizer.bos_token_id not in without.prompt_ids
    tokenizer.chat_template = "<|start|>" + tokenizer.chat_template
    (pair,) = encode([CHAT_FORMS["messages"]])
    assert pair.prompt_ids == [tokenizer.bos_token_id, *without.prompt_ids]
    assert tokenizer.bos_token_id not in pair.chosen_ids


@pytest.mark.parametrize(
    "template",
    [
        SILENT_TEMPLATE,
        SILENT_TEMPLATE.replace("{% endfor %}", "<|end|>{% endfor %}"),
        SILENT_TEMPLATE.replace("{% endfor %}", "<|end|>\n{% endfor %}"),
        SILENT_TEMPLATE.replace("{% endfor %}", "<|end|><|end|>{% endfor %}"),
    ],
    ids=["none", "one", "text behind it", "two"],
)
def test_completions_end_with_their_only_stop_token(encode, tokenizer, template):
    tokenizer.chat_template = template
    (pair,) = encode([CHAT_FORMS["messages"]])
    assert tokenizer.decode(pair.chosen_ids) == f"{GOOD}<|end|>" and pair.chosen_ids.count(END) == 1
    assert tokenizer.decode(pair.rejected_ids) == f"{BAD}<|end|>" and pair.rejected_ids.count(END) == 1


def test_stop_tokens_of_the_model_count_too(encode, tokenizer):
    """As in Llama 3 and Qwen, where chats end with another token than texts."""
    tokenizer.chat_template = SILENT_TEMPLATE.replace("{% endfor %}", "<|system|>{% endfor %}")
    encode.stop_ids = [END, tokenizer.convert_tokens_to_ids("<|system|>")]
    (pair,) = encode([CHAT_FORMS["messages"]])
    assert tokenizer.decode(pair.chosen_ids) == f"{GOOD}<|system|>"


def test_stop_token_stays_where_it_is_the_padding_too(encode, tokenizer):
    (own,) = encode([CHAT_FORMS["messages"]])
    tokenizer.pad_token = tokenizer.eos_token
    assert [ids_of(own)] == [ids_of(pair) for pair in encode([CHAT_FORMS["messages"]])]
    assert own.chosen_ids[-1] == END


def test_prompts_may_hold_stop_tokens(encode, tokenizer):
    row = {"prompt": f"{QUESTION}<|end|>{QUESTION}", "chosen": GOOD, "rejected": BAD}
    (pair,) = encode([row])
    assert pair.prompt_ids.count(END) == 1 and tokenizer.decode(pair.prompt_ids) == row["prompt"]


# === What is left out ===


def test_long_pairs_are_dropped(encode, capsys):
    rows = [{"prompt": QUESTION, "chosen": GOOD * n, "rejected": BAD} for n in (1, 2, 9)]
    lengths = [len(pair) for pair in encode(rows)]
    assert lengths == sorted(set(lengths))
    capsys.readouterr()
    assert [pair.row for pair in encode(rows, max_length=lengths[1])] == [0, 1]
    assert f"3 rows, 1 dropped and 0 cut for having over {lengths[1]} tokens" in capsys.readouterr().out
    assert [pair.row for pair in encode(rows, max_length=lengths[1] - 1)] == [0]


def test_long_completions_are_cut_on_the_right(encode, capsys):
    rows = [{"prompt": QUESTION * n, "chosen": GOOD * 3, "rejected": BAD} for n in (1, 20)]
    whole = encode(rows)[0]
    prompt, chosen, rejected = ids_of(whole)
    assert len(rejected) < len(chosen)
    limit = len(whole) - 2
    capsys.readouterr()
    (pair,) = encode(rows, max_length=limit, overlong="truncate")
    assert ids_of(pair) == (prompt, chosen[:-2], rejected)  # a cut completion has no stop token, a whole one keeps it
    assert "2 rows, 1 dropped and 1 cut" in capsys.readouterr().out  # a prompt is never cut
    (pair,) = encode(rows, max_length=len(prompt) + 1, overlong="truncate")
    assert ids_of(pair) == (prompt, chosen[:1], rejected[:1])
    assert encode(rows, max_length=len(prompt), overlong="truncate") == []


def test_cut_pairs_are_counted(encode, capsys):
    rows = [{"prompt": QUESTION, "chosen": GOOD * n, "rejected": BAD} for n in (1, 5, 6)]
    encode(rows, max_length=len(encode(rows[:1])[0]) + 1, overlong="truncate")
    assert "3 rows, 0 dropped and 2 cut" in capsys.readouterr().out


@pytest.mark.parametrize("prob, read", [(0, 0.0), (1, 1.0), (0.3, 0.3), (None, 1.0)])
def test_preference_prob(encode, prob, read):
    (pair,) = encode([CHAT_FORMS["messages"] | {"preference_prob": prob}])
    assert pair.preference_prob == read


# === Files and splits ===


def make_rows(count):
    return [{"prompt": f"{QUESTION} {i}", "chosen": GOOD, "rejected": BAD} for i in range(count)]


def numbers(pairs):
    return [int(pair.prompt.split()[-1]) for pair in pairs]


@pytest.fixture
def load(tokenizer, tmp_path):
    def run(path, **flags):
        args = dpo.Args(dataset_name=str(path), **{"num_eval_prompts": 10_000} | flags)
        settings = {
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "micro_batch_tokens": 2048,
            "stop_ids": [END],
        }
        run = dpo.Run(args, tmp_path, tokenizer=tokenizer, **settings)
        return [numbers(pairs) for pairs in dpo.load_pairs(run, *dpo.read_splits(args))]

    return run


@pytest.mark.parametrize("count, kept", [(3, 1), (100, 10), (5200, 512)])
def test_last_rows_of_a_file_are_kept_for_the_test(load, tmp_path, count, kept):
    train, test = load(write_rows(tmp_path / "rows.jsonl", make_rows(count)))
    assert train == list(range(count - kept)) and test == list(range(count - kept, count))


def test_same_named_splits_share_all_rows(load, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_rows(20))
    assert load(path, dataset_test_split="train") == [list(range(20))] * 2


def test_number_of_test_pairs(load, tmp_path):
    assert load(write_rows(tmp_path / "rows.jsonl", make_rows(50)), num_eval_prompts=3)[1] == [45, 46, 47]


def test_lengths_are_shown(load, tmp_path, tokenizer, capsys):
    """Of 101 pairs whose longer completions have 100 to 200 words."""
    row, word = {"prompt": "7", "rejected": " no"}, len(tokenizer(" no").input_ids)
    rows = [row | {"chosen": " no" * (100 + count)} for count in (*range(0, 101, 2), *range(1, 100, 2))]
    write_rows(tmp_path / "train.jsonl", rows)
    load(tmp_path, dataset_test_split="train")
    rest = len(tokenizer("7").input_ids) + 1
    half, most, whole = (rest + word * words for words in (150, 195, 200))
    assert f"half up to {half}, 95 % up to {most}, all up to {whole}\n" in capsys.readouterr().out


def test_file_types(load, tmp_path):
    lines = write_rows(tmp_path / "a.jsonl", make_rows(20))
    Path(tmp_path / "b.json").write_text(json.dumps(make_rows(20), indent=1), encoding="utf-8")
    Path(tmp_path / "c.jsonl").write_text(
        "\ufeff" + Path(lines).read_text().replace("}\n", "}\r\n\n"), encoding="utf-8"
    )
    parquet.write_table(Table.from_pylist(make_rows(20)), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.jsonl", "d.parquet"):
        assert load(tmp_path / name) == [list(range(18)), [18, 19]], name


def test_folder_of_splits(load, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", make_rows(20))
    assert load(tmp_path / "data") == [list(range(18)), [18, 19]]
    write_rows(tmp_path / "data" / "test.jsonl", make_rows(5))
    write_rows(tmp_path / "data" / "other.jsonl", make_rows(3))
    assert load(tmp_path / "data") == [list(range(20)), list(range(5))]
    assert load(tmp_path / "data", dataset_train_split="other", dataset_test_split="train") == [
        [0, 1, 2],
        list(range(20)),
    ]


def test_save_to_disk(load, tmp_path):
    train, test = (datasets.Dataset.from_list(make_rows(count)) for count in (20, 5))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one") == [list(range(18)), [18, 19]]
    assert load(tmp_path / "two") == [list(range(20)), list(range(5))]


@pytest.mark.parametrize("rows", [{"instruction": QUESTION}, {"prompt": QUESTION}, {"prompt": [user(QUESTION)]}])
def test_eval_prompts(tokenizer, tmp_path, rows):
    args = dpo.Args(eval_prompts=write_rows(tmp_path / "prompts.jsonl", [rows, rows]))
    run = dpo.Run(args, tmp_path, torch.device("cpu"), torch.float32, 2048, tokenizer, [END])
    assert (
        dpo.load_eval_prompts(run, [])
        == [([user(QUESTION)], tokenizer(f"<|user|>{QUESTION}<|assistant|>").input_ids)] * 2
    )


# === Batches ===


def plan(pairs, **flags):
    return dpo.plan_batches(dpo.Args(**flags), pairs)


def test_every_pair_once_an_epoch():
    batches = plan(list(range(23)), batch_size=5, num_train_epochs=3)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] * 3
    epochs = [sum(batches[k : k + 5], []) for k in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_depends_on_seed_and_epoch_alone():
    pairs = list(range(23))
    order = sum(plan(pairs, batch_size=23), [])
    assert order != pairs
    assert sum(plan(pairs, batch_size=4, beta=0.7, max_length=7), []) == order
    assert sum(plan(pairs, batch_size=4, num_train_epochs=3), [])[:23] == order
    assert sum(plan(pairs, batch_size=23, seed=2), []) != order


@pytest.mark.parametrize("max_steps, count", [(-1, 10), (0, 0), (3, 3), (99, 10)])
def test_max_steps(max_steps, count):
    batches = plan(list(range(23)), batch_size=5, num_train_epochs=2, max_steps=max_steps)
    assert batches == plan(list(range(23)), batch_size=5, num_train_epochs=2)[:count] and len(batches) == count


@pytest.mark.parametrize("tokens", [1, 40, 200, 10**6])
@pytest.mark.parametrize("world_size", [1, 3])
def test_micro_batches_cover_all_rows_within_the_budget(monkeypatch, world_size, tokens):
    monkeypatch.setattr(dpo, "WORLD_SIZE", world_size)
    lengths = torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [group for rank in range(world_size) for group in dpo.cut_by_length(lengths, 2, tokens, rank)]
    assert sorted(i for group in groups for i in group) == list(range(50))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) * 2 <= tokens
    if tokens == 10**6:
        assert len(groups) == world_size


def test_equal_completions_are_dropped(load, tmp_path, capsys):
    rows = make_rows(12)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[11]["chosen"] = rows[11]["rejected"]
    train, test = load(write_rows(tmp_path / "rows.jsonl", rows), dataset_test_split="train")
    assert train == test == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert "4 dropped for having chosen = rejected" in capsys.readouterr().out
