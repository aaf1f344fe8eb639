"""sample.py: the chat, the answers to a file of prompts, and their scores."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, TOY, load_script, read_rows, write_rows

sample = load_script("sample")
PROMPTS = [row["prompt"] for row in read_rows(TOY / "test.jsonl")[:6]]
PROMPTS[2] = [{"role": "system", "content": "Be brief."}, *PROMPTS[2]]


def answer_rows(folder, model, rows, **flags):
    """What sample.py writes for rows of prompts."""
    prompts, output = write_rows(folder / "prompts.jsonl", rows), folder / "out" / "answers.json"
    sample.main(sample.Args(str(model), prompts=Path(prompts), output=output, **flags))
    return json.loads(output.read_text())


def continue_greedily(model, tokenizer, text, stop_ids, length):
    """By hand: one token after the other, without padding and cache."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    answer = []
    while len(answer) < length and not set(answer[-1:]) & set(stop_ids):
        with torch.no_grad():
            answer.append(model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
    return answer


def render(tokenizer, chat):
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def load_plain(path, kind="AutoModelForCausalLM"):
    model = getattr(transformers, kind).from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def score_plainly(messages, answer):
    judge, tokenizer = load_plain(TOY / "judge", "AutoModelForSequenceClassification")
    text = ""
    for message in [*messages, {"role": "assistant", "content": answer}]:
        text += f"<|{message['role']}|>{message['content']}" + "<|end|>" * (message["role"] == "assistant")
    ids = tokenizer(text).input_ids
    judge.config.pad_token_id = None
    with torch.no_grad():
        return judge(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("family", ["toy", "gpt2"])
def test_greedy_answers_are_those_of_single_prompts(tiny_model, tmp_path, family):
    """Batches are padded, and gpt2 has absolute positions. A model's own stop tokens count, its penalties do not."""
    path = tmp_path / "model"
    shutil.copytree(TOY / "policy" if family == "toy" else tiny_model(family), path)
    model, tokenizer = load_plain(path)
    texts = [render(tokenizer, prompt) for prompt in PROMPTS]
    stop_ids = [0, continue_greedily(model, tokenizer, texts[0], [], 5)[-1]]
    transformers.GenerationConfig(eos_token_id=stop_ids, repetition_penalty=9.0).save_pretrained(path)
    expected = [continue_greedily(model, tokenizer, text, stop_ids, 30) for text in texts]
    assert len(expected[0]) <= 5 and len({len(answer) for answer in expected}) > 1
    rows = answer_rows(tmp_path, path, [{"prompt": prompt} for prompt in PROMPTS], temperature=0, max_new_tokens=30)
    assert [list(row) for row in rows] == [["instruction", "output", "generator"]] * 6
    assert [row["instruction"] for row in rows][1:3] == [
        PROMPTS[1][0]["content"],
        f"Be brief.\n\n{PROMPTS[2][1]['content']}",
    ]
    assert [row["output"] for row in rows] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_strings_are_what_a_user_says_and_without_a_template_the_text(tiny_model, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model(), path)
    model, tokenizer = load_plain(path)
    for template in (True, False):
        if not template:
            (path / "chat_template.jinja").unlink()
        rows = answer_rows(tmp_path, path, [{"instruction": "Review the hotel."}], temperature=0, max_new_tokens=9)
        text = (
            render(tokenizer, [{"role": "user", "content": "Review the hotel."}]) if template else "Review the hotel."
        )
        ids = continue_greedily(model, tokenizer, text, [0], 9)
        assert rows[0]["output"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_samples_are_of_the_whole_distribution(tiny_model):
    """Of 2,000 first tokens as many are beyond the 50 likeliest ones as the model's probabilities say."""
    args = sample.Args(tiny_model(), temperature=1.5, max_new_tokens=1)
    _, model, tokenizer = sample.load(args.model)
    chat = [{"role": "user", "content": "Review the hotel."}]
    answers = sample.generate(args, model, tokenizer, [chat] * 2000, 0)
    ids = tokenizer(render(tokenizer, chat), add_special_tokens=False).input_ids
    probs = (model(torch.tensor([ids])).logits[0, -1] / 1.5).softmax(-1)
    texts = tokenizer.batch_decode([[token] for token in range(len(probs))], skip_special_tokens=True)
    likely = {texts[token] for token in probs.topk(50).indices.tolist()}
    expected = sum(prob for prob, text in zip(probs.tolist(), texts, strict=True) if text not in likely)
    found = statistics.fmean([answer not in likely for answer in answers])
    assert 0.05 < expected < 0.95 and abs(found - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_seed_decides_and_a_compared_model_meets_the_same_luck(tmp_path, capsys):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    flags = {"batch_size": 4, "max_new_tokens": 12}
    first = answer_rows(tmp_path, TOY / "policy", rows, **flags, compare=str(TOY / "policy"), judge=str(TOY / "judge"))
    assert first == json.loads((tmp_path / "out" / "answers.compare.json").read_text())
    assert "win rate of policy: 0.500 +- 0.000" in capsys.readouterr().out
    assert first == answer_rows(tmp_path, TOY / "policy", rows, **flags)
    assert first != answer_rows(tmp_path, TOY / "policy", rows, **flags, seed=2)


def test_adapter_of_a_run_answers_as_the_merged_model(tiny_model, tmp_path):
    base, tokenizer = load_plain(tiny_model())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "args.json").write_text("{}")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    outputs = []
    for path in ("run", "run/model", "merged"):
        rows = answer_rows(tmp_path, tmp_path / path, [{"prompt": prompt} for prompt in PROMPTS], max_new_tokens=12)
        assert {row["generator"] for row in rows} == {path.split("/")[0]}
        outputs.append([row["output"] for row in rows])
    assert outputs[0] == outputs[1] == outputs[2]
    base_rows = answer_rows(tmp_path, tiny_model(), [{"prompt": prompt} for prompt in PROMPTS], max_new_tokens=12)
    assert [row["output"] for row in base_rows] != outputs[0]


def test_judge_and_win_rate(tiny_model, tmp_path, capsys):
    shutil.copytree(TOY / "judge", tmp_path / "judge")
    config = json.loads((TOY / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))  # the stop token, as many
    flags = {"compare": tiny_model(), "judge": str(tmp_path / "judge"), "max_new_tokens": 20}
    tables = [answer_rows(tmp_path, TOY / "policy", [{"prompt": prompt} for prompt in PROMPTS], **flags)]
    tables.append(json.loads((tmp_path / "out" / "answers.compare.json").read_text()))
    scores = []
    for rows in tables:
        scores.append([score_plainly(prompt, row["output"]) for prompt, row in zip(PROMPTS, rows, strict=True)])
    wins = [float(ours > theirs) for ours, theirs in zip(*scores, strict=True)]
    printed = re.findall(r": (-?\d\.\d{3}) \+- (\d\.\d{3})$", capsys.readouterr().out, re.M)
    for (mean, interval), values in zip(printed, [*scores, wins], strict=True):
        assert float(mean) == pytest.approx(statistics.fmean(values), abs=6e-4)
        assert float(interval) == pytest.approx(1.96 * statistics.pstdev(values) / 6**0.5, abs=6e-4)


def test_arena_hard(tmp_path):
    """What Arena-Hard-Auto's gen_judgment.py and add_markdown_info.py read of an answer."""
    questions = [{"uid": uid, "category": "hard_prompt", "prompt": f"Review the {uid}."} for uid in ("film", "phone")]
    prompts, output = write_rows(tmp_path / "question.jsonl", questions), tmp_path / "policy.jsonl"
    args = sample.Args(str(TOY / "policy"), prompts=Path(prompts), output=output, output_format="arena-hard")
    sample.main(args)
    rows = read_rows(output)
    assert [(row["uid"], row["model"]) for row in rows] == [("film", "policy"), ("phone", "policy")]
    assert len({row["ans_id"] for row in rows}) == 2
    for row, question in zip(rows, questions, strict=True):
        assert row["messages"][0] == {"role": "user", "content": question["prompt"]}
        assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"]["answer"]


def test_chat_through_a_pipe():
    """The second answer knows of the first one, and an empty line is the end."""
    model, tokenizer = load_plain(TOY / "policy")
    chat, expected = [], ""
    for line in ("Review the hotel Old Star.", "Say something about the film Last Road."):
        chat.append({"role": "user", "content": line})
        ids = continue_greedily(model, tokenizer, render(tokenizer, chat), [0], 50)
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        expected += f"> \n{answer}\n(judge's score {score_plainly(chat, answer):.3f})\n\n"
        chat.append({"role": "assistant", "content": answer})
    lines = "".join([message["content"] + "\n" for message in chat[::2]]) + "\nnot read\n"
    command = [sys.executable, ROOT / "sample.py", TOY / "policy", "--judge", TOY / "judge", "--temperature", "0"]
    ended = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout == expected + "> ", ended.stdout + ended.stderr[-3000:]


def test_what_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="error: --prompts and --output go together"):
        sample.main(sample.Args(str(TOY / "policy"), output=tmp_path / "answers.json"))
    with pytest.raises(SystemExit, match="error: row 1 of .* has no instruction or prompt"):
        answer_rows(tmp_path, TOY / "policy", [{"prompt": "Hello"}, {"text": "Hello"}])
    with pytest.raises(SystemExit, match="error: a prompt of .* tokens leaves the model no room to answer"):
        answer_rows(tmp_path, TOY / "policy", [{"prompt": "Hello " * 1024}])
    with pytest.raises(SystemExit, match="has no weights for score.weight"):
        sample.main(sample.Args(str(TOY / "policy"), judge=str(TOY / "policy")))
