"""sample.py: the chat, the answers to a file of prompts, their scores, and labels by a person."""

import io
import json
import os
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
import termios
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, TOY, load_script, read_rows, start, write_rows

sample = load_script("sample")
PROMPTS = [row["prompt"] for row in read_rows(TOY / "test.jsonl")[:6]]
PROMPTS[2] = [{"role": "system", "content": "Be brief."}, *PROMPTS[2]]


def answer_rows(folder, model, rows, **flags):
    prompts, output = write_rows(folder / "prompts.jsonl", rows), folder / "out" / "answers.json"
    sample.main(sample.Args(str(model), prompts=Path(prompts), output=output, **flags))
    return json.loads(output.read_text())


def continue_greedily(model, tokenizer, text, stop_ids, length):
    """By hand: one token after the other, without padding and cache."""
    ids, answer = tokenizer(text, add_special_tokens=False).input_ids, []
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
    chat = [*messages, {"role": "assistant", "content": answer}]
    texts = [f"<|{m['role']}|>{m['content']}" + "<|end|>" * (m["role"] == "assistant") for m in chat]
    ids = tokenizer("".join(texts)).input_ids
    judge.config.pad_token_id = None
    with torch.no_grad():
        return judge(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("family", ["toy", "gpt2"])
def test_greedy_answers_are_those_of_single_prompts(tiny_model, tmp_path, family):
    """Batches are padded, and gpt2 has absolute positions. A model's own stop tokens count, its penalties do not."""
    path = shutil.copytree(TOY / "policy" if family == "toy" else tiny_model(family), tmp_path / "model")
    model, tokenizer = load_plain(path)
    texts = [render(tokenizer, prompt) for prompt in PROMPTS]
    stop_ids = [0, continue_greedily(model, tokenizer, texts[0], [], 5)[-1]]
    transformers.GenerationConfig(eos_token_id=stop_ids, repetition_penalty=9.0).save_pretrained(path)
    expected = [continue_greedily(model, tokenizer, text, stop_ids, 30) for text in texts]
    assert len(expected[0]) <= 5 and len({len(answer) for answer in expected}) > 1
    rows = answer_rows(tmp_path, path, [{"prompt": prompt} for prompt in PROMPTS], temperature=0, max_new_tokens=30)
    assert [list(row) for row in rows] == [["instruction", "output", "generator"]] * 6
    assert rows[2]["instruction"] == f"Be brief.\n\n{PROMPTS[2][1]['content']}"
    assert [row["output"] for row in rows] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_strings_are_what_a_user_says_and_without_a_template_the_text(tiny_model, tmp_path):
    path, text = shutil.copytree(tiny_model(), tmp_path / "model"), "Review the hotel."
    model, tokenizer = load_plain(path)
    for prompt in (render(tokenizer, [{"role": "user", "content": text}]), text):
        rows = answer_rows(tmp_path, path, [{"instruction": text}], temperature=0, max_new_tokens=9)
        ids = continue_greedily(model, tokenizer, prompt, [0], 9)
        assert rows[0]["output"] == tokenizer.decode(ids, skip_special_tokens=True)
        (path / "chat_template.jinja").unlink(missing_ok=True)


def test_samples_are_of_the_whole_distribution(tiny_model):
    """As many of 2,000 first tokens are outside the 50 likeliest ones as the model's probabilities say."""
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


def test_seed_decides_and_a_compared_model_gets_the_same_random_numbers(tmp_path, capsys):
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(PROMPTS)]
    flags, judge = {"batch_size": 4, "max_new_tokens": 12}, tmp_path / "judge.py"
    reward = 'def reward(completions, n, **_): return [i * len(c[0]["content"]) for i, c in zip(n, completions)]'
    judge.write_text(reward)
    first = answer_rows(tmp_path, TOY / "policy", rows, **flags, compare=str(TOY / "policy"), judge=str(judge))
    assert first == json.loads((tmp_path / "out" / "answers.compare.json").read_text())
    mean, printed = statistics.fmean([i * len(row["output"]) for i, row in enumerate(first)]), capsys.readouterr().out
    assert f"score of policy: {mean:.3f} +- " in printed and "win rate of policy: 0.500 +- 0.000" in printed
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
    ours = answer_rows(tmp_path, TOY / "policy", [{"prompt": prompt} for prompt in PROMPTS], **flags)
    theirs = json.loads((tmp_path / "out" / "answers.compare.json").read_text())
    scores = [list(map(score_plainly, PROMPTS, [row["output"] for row in rows])) for rows in (ours, theirs)]
    wins = [float(ours > theirs) for ours, theirs in zip(*scores, strict=True)]
    printed = re.findall(r": (-?\d\.\d{3}) \+- (\d\.\d{3})$", capsys.readouterr().out, re.M)
    for (mean, interval), values in zip(printed, [*scores, wins], strict=True):
        expected = [statistics.fmean(values), 1.96 * statistics.pstdev(values) / 6**0.5]
        assert [float(mean), float(interval)] == pytest.approx(expected, abs=6e-4)


def test_arena_hard(tmp_path):
    """What Arena-Hard-Auto's gen_judgment.py and add_markdown_info.py read of an answer."""
    questions = [{"uid": uid, "category": "hard_prompt", "prompt": f"Review the {uid}."} for uid in ("film", "phone")]
    prompts, output = write_rows(tmp_path / "question.jsonl", questions), tmp_path / "policy.jsonl"
    sample.main(sample.Args(str(TOY / "policy"), prompts=Path(prompts), output=output, output_format="arena-hard"))
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
    assert ended.returncode == 0 and ended.stdout == expected + "> \n", ended.stdout + ended.stderr[-3000:]


def test_labels_by_a_person(tmp_path, monkeypatch, capsys):
    """The chosen answer is the one that the screen shows under the key; dpo.py and kto.py read the file."""
    paths, label = [str(TOY / name) for name in ("policy", "annotator")], tmp_path / "labels.jsonl"
    prompts = Path(write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]))
    args = sample.Args(paths[0], compare=paths[1], prompts=prompts, label=label, temperature=0, max_new_tokens=9)
    for keys in ("1ts2xu1", "u21"):  # the end of the input quits, and the same command goes on
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(keys)))
        sample.main(args)
    screens = re.findall(r"1\]\n(.+)\n\n\[answer 2\]\n(.+)\n\n1: .* > (.)", capsys.readouterr().out)
    assert "".join([key for *_, key in screens]) == "1ts2u1qu21q"
    assert {len(first) < len(second) for first, second, _ in screens} == {True, False}  # in random order
    model, tokenizer = load_plain(paths[0])
    ids = continue_greedily(model, tokenizer, render(tokenizer, PROMPTS[0]), [0], 9)
    assert tokenizer.decode(ids, skip_special_tokens=True) in screens[0]
    rows, expected = read_rows(label), [(0, 0, 0, 1.0), (1, 1, 0, 0.5), (3, 8, 1, 1.0), (4, 9, 0, 1.0)]
    for row, (i, screen, side, prob) in zip(rows, expected, strict=True):
        chosen, rejected = [[{"role": "assistant", "content": screens[screen][k]}] for k in (side, 1 - side)]
        assert row == {"prompt": PROMPTS[i], "chosen": chosen, "rejected": rejected, "preference_prob": prob}
    assert [len(load_script(s).encode_rows(start(s, paths[0]), rows, "train")) for s in ("dpo", "kto")] == [4, 4]


def test_terminal_takes_single_keys_until_ctrl_c(tmp_path):
    (keyboard, terminal), label = pty.openpty(), tmp_path / "labels.jsonl"
    before = termios.tcgetattr(terminal)
    command = [sys.executable, ROOT / "sample.py", TOY / "policy", "--prompts", TOY / "test.jsonl", "--label", label]

    def as_in_a_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else ignored if a script runs this in the background
        signal.alarm(300)

    with subprocess.Popen(command, stdin=terminal, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal) as run:
        for labelled in (False, True):
            while label.exists() != labelled or termios.tcgetattr(terminal) == before:  # until it waits for a key
                assert run.poll() is None
                time.sleep(0.05)
            run.send_signal(signal.SIGINT) if labelled else os.write(keyboard, b"1")
        assert b"Traceback" not in run.communicate()[1] and run.returncode == 0
    assert len(read_rows(label)) == 1 and termios.tcgetattr(terminal) == before


def test_what_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="error: --prompts goes with either --output or --label"):
        sample.main(sample.Args(str(TOY / "policy"), output=tmp_path / "answers.json"))
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: the run in .* has not ended: there is no .*model"):
        sample.load(str(tmp_path))
    with pytest.raises(SystemExit, match="error: row 1 of .* has no instruction or prompt"):
        answer_rows(tmp_path, TOY / "policy", [{"prompt": "Hello"}, {"text": "Hello"}])
    with pytest.raises(SystemExit, match="error: a prompt of .* tokens leaves the model no room to answer"):
        answer_rows(tmp_path, TOY / "policy", [{"prompt": "Hello " * 1024}])
    with pytest.raises(SystemExit, match="has no weights for score.weight"):
        sample.main(sample.Args(str(TOY / "policy"), judge=str(TOY / "policy")))
