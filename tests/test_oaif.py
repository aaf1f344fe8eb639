"""OAIF: its losses in closed form, what the annotator is asked, and what becomes of its preferences."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import TOY, load_script, make_batch, read_rows, start

oaif = load_script("oaif")
GOOD = "The rooms were great. The staff was friendly. I would stay there again."
BAD = "The rooms were terrible."
HOTEL = [{"role": "user", "content": "Review the hotel Blue Crown."}]


def asked(prompt, **columns):
    """A pair of which the annotator reads the prompt, and a Python file the other columns, too."""
    return oaif.Pair(0, prompt, columns, [], [], [], 1.0)


def load_float32(path, kind="CausalLM"):
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(path, dtype=torch.float32)


def reply(monkeypatch, log_odds):
    """Let the annotator reply 1 with log-odds of the instruction, the request and the answers that it reads."""
    form = (
        r"(.*)\n\nRequest: (.*)\n\nAnswer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nWhich answer is better\? Reply with 1 or 2\."
    )

    def ask(run, annotator, questions):
        return torch.tensor([log_odds(*re.fullmatch(form, text, re.DOTALL).groups()) for text in questions]).sigmoid()

    monkeypatch.setattr(oaif, "ask", ask)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@torch.no_grad()
def naive_logp(model, prompt, answer):
    """Of an answer, by transformers' own loss of the row alone."""
    labels = torch.tensor([[-100] * len(prompt) + answer])
    return -len(answer) * model(torch.tensor([prompt + answer]), labels=labels).loss.item()


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_losses_and_gradients(loss):
    batch = make_batch(50, script="oaif")
    batch.logps.requires_grad_()
    losses, metrics = oaif.compute_loss(batch, loss, 0.2)
    (gradients,) = torch.autograd.grad(losses.sum(), batch.logps)
    chosen, rejected = (batch.logps - batch.ref_logps).detach()
    h = (chosen - rejected).tolist()
    expected = {
        "dpo": [(math.log1p(math.exp(-0.2 * x)), -0.2 / (1 + math.exp(0.2 * x))) for x in h],
        "ipo": [((x - 2.5) ** 2, 2 * (x - 2.5)) for x in h],
        "slic": [(1 - 0.2 * x, -0.2) if x < 5 else (0, 0) for x in h],
    }[loss]
    assert losses.tolist() == pytest.approx([value for value, _ in expected])
    assert gradients[0].tolist() == pytest.approx([slope for _, slope in expected])
    assert gradients[1].tolist() == pytest.approx([-slope for _, slope in expected])
    assert loss != "slic" or {0} < set(losses.tolist())
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.2 * x for x in h])
    assert metrics["rewards/accuracies"].tolist() == [float(x > 0) for x in h]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_probability_of_a_reply_is_that_of_its_token(tiny_model, family):
    """By a forward pass of each question alone, and a softmax over the replies 1 and 2; packed, but for gemma2."""
    run = start("oaif", tiny_model(), annotator_name_or_path=tiny_model(family), micro_batch_tokens=100)
    annotator, model = oaif.load_annotator(run), load_float32(tiny_model(family))
    assert (annotator.model.config._attn_implementation == "packed") == (family != "gemma2")
    questions, expected = ["So? " * 30, "Which?", "Which of the two is better?", "Which of those?"], []
    for question in questions:
        ids = annotator.tokenizer(f"<|user|>{question}<|assistant|>", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        one, two = [logits[annotator.tokenizer(reply).input_ids].exp().item() for reply in "12"]
        expected.append(one / (one + two))
    assert oaif.ask(run, annotator, questions).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_replies_that_are_not_single_tokens(tmp_path):
    """A tokenizer that takes a 2 apart."""
    folder = shutil.copytree(TOY / "policy", tmp_path / "annotator")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "2"}, "content": "two, that is to say"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    run = start("oaif", TOY / "policy", annotator_name_or_path=str(folder))
    with pytest.raises(SystemExit, match="^error: to the annotator's tokenizer, the replies 1 and 2"):
        oaif.ask(run, oaif.load_annotator(run), ["Which?"])


@pytest.mark.parametrize("bias", [-5.0, 0.0, 5.0])
def test_both_orders_cancel_a_bias_for_a_position(monkeypatch, bias):
    """Where there is nothing else, nothing is left of it; where there is, it never decides."""
    scores = {"good": 2.0, "fair": 0.0, "bad": 0.0}
    reply(monkeypatch, lambda instruction, request, one, two: bias + scores[one] - scores[two])
    annotator = oaif.Annotator("", None, None, ["Be kind."])
    orders = oaif.annotate(None, annotator, [asked(HOTEL)] * 3, ["fair", "good", "bad"], ["bad", "bad", "good"])
    expected = [[sigmoid(bias + gap), 1 - sigmoid(bias - gap)] for gap in (0, 2, -2)]
    torch.testing.assert_close(orders, torch.tensor(expected).T)
    even, better, worse = orders.mean(0).tolist()
    assert even == pytest.approx(0.5, abs=1e-6) and worse < 0.49 < 0.51 < better


def test_principles_are_averaged(monkeypatch, tmp_path):
    """Over the lines of the file; the request is a string, a message, or the conversation so far."""
    (tmp_path / "principles.txt").write_text("Be kind.\n\nBe brief.\n")
    run, requests = start("oaif", TOY / "policy", principles=str(tmp_path / "principles.txt")), []
    reply(monkeypatch, lambda text, request, *_: requests.append(request) or (1.0 if text == "Be kind." else -3.0))
    turns = [*HOTEL, {"role": "assistant", "content": "It was great."}, {"role": "user", "content": "Why?"}]
    pairs = [asked("Film?"), asked(HOTEL), asked(turns)]
    orders = oaif.annotate(run, oaif.load_annotator(run), pairs, ["a"] * 3, ["b"] * 3)
    mean = (sigmoid(1) + sigmoid(-3)) / 2
    torch.testing.assert_close(orders, torch.tensor([[mean] * 3, [1 - mean] * 3]))
    conversation = "user: Review the hotel Blue Crown.\n\nassistant: It was great.\n\nuser: Why?"
    assert requests == ["Film?", "Review the hotel Blue Crown.", conversation] * 4


@torch.no_grad()
def test_a_reward_model_as_annotator(tmp_path):
    """By Bradley-Terry: the sigmoid of the difference of the scores, read at the last token, a padding token or not."""
    folder = shutil.copytree(TOY / "judge", tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    run = start("oaif", TOY / "policy", annotator_name_or_path=str(folder))
    annotator, judge = oaif.load_annotator(run), load_float32(TOY / "judge", "SequenceClassification")
    texts = [f"<|user|>Review the hotel Blue Crown.<|assistant|>{answer}<|end|>" for answer in (GOOD, BAD)]
    good, bad = [judge(torch.tensor([annotator.tokenizer.encode(text)])).logits.item() for text in texts]
    orders = oaif.annotate(run, annotator, [asked(HOTEL)] * 2, [GOOD, BAD], [BAD, GOOD])
    assert orders.tolist() == [pytest.approx([sigmoid(good - bad), sigmoid(bad - good)], abs=1e-4)] * 2
    assert good > bad + 0.1


REWARD = """
def reward(prompts, completions, word, **others):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    assert {type(text) for text in completions} == {type(prompt) for prompt in prompts}
    return [text.count(wanted) for text, wanted in zip(texts, word, strict=True)]
"""


@pytest.mark.parametrize("prompt", ["Film?", HOTEL], ids=["text", "chat"])
def test_a_python_file_as_annotator(tmp_path, prompt):
    """By Bradley-Terry as well, each answer with the columns of its row; the order does not matter to it."""
    (tmp_path / "reward.py").write_text(REWARD)
    run = start("oaif", TOY / "policy", annotator_name_or_path=str(tmp_path / "reward.py"))
    pairs, firsts, seconds = [asked(prompt, word=word) for word in "abb"], ["aabbb", "ab", ""], ["a", "abbb", "bbbb"]
    orders = oaif.annotate(run, oaif.load_annotator(run), pairs, firsts, seconds)
    assert orders.tolist() == [pytest.approx([sigmoid(2 - 1), sigmoid(1 - 3), sigmoid(0 - 4)])] * 2


CASES = [  # answers, of which those that end with / were cut off; preferences of both orders; chosen; its probability
    ("Great.", "Bad.", (0.9, 0.7), 0, 0.8),
    ("Bad.", "I liked it.", (0.4, 0.2), 1, 0.7),
    ("Great/", "Bad.", (0.9, 0.9), 1, 1.0),
    ("Bad.", "Great/", (0.1, 0.1), 0, 1.0),
    ("Great/", "I liked it/", (0.6, 0.1), 1, 0.65),
    ("The same.", "The same.", (0.6, 0.4), 0, 0.5),
    ("Fine.", "", (0.9, 0.9), 0, 0.9),
]


def test_pairs(tmp_path, monkeypatch):
    """An answer that ended wins against one that did not, whatever is said. Cut, equal or empty, it is not written."""
    run = start("oaif", TOY / "policy", output_dir=str(tmp_path))
    truths = oaif.encode_rows(run, read_rows(TOY / "train.jsonl")[: len(CASES)], "train")
    policy = oaif.load_model(run, run.args.model_name_or_path, trainable=True)
    columns = list(zip(*CASES, strict=True))
    sides = [[run.tokenizer.encode(text.rstrip("/")) + [0] * (text[-1:] != "/") for text in columns[k]] for k in (0, 1)]
    monkeypatch.setattr(oaif, "generate", lambda *_: sides[0] + sides[1])
    monkeypatch.setattr(oaif, "annotate", lambda *_: torch.tensor(columns[2]).T)
    pairs, metrics = oaif.make_pairs(run, policy, None, truths, 3)
    for i, better in enumerate(columns[3]):
        assert pairs[i] == replace(truths[i], chosen_ids=sides[better][i], rejected_ids=sides[1 - better][i])
    assert metrics["train/cut_answers"] == pytest.approx(4 / 14) and metrics["train/equal_answers"] == pytest.approx(
        1 / 7
    )
    assert metrics["train/order_agreement"] == pytest.approx(6 / 7)  # all but the one that was cut off twice
    assert metrics["train/preference"] == pytest.approx(sum(columns[4]) / 7)
    assert metrics["train/chosen_length"] == pytest.approx(sum([len(pair.chosen_ids) for pair in pairs]) / 7)
    assert metrics["train/rejected_length"] == pytest.approx(sum([len(pair.rejected_ids) for pair in pairs]) / 7)

    written = read_rows(tmp_path / "annotated.jsonl")
    assert [row["annotator_prob"] for row in written] == pytest.approx(columns[4][:2])
    assert [row["step"] for row in written] == [3, 3]
    read_by_dpo = load_script("dpo").encode_rows(start("dpo", TOY / "policy"), written, "train")
    for made, read in zip(pairs[:2], read_by_dpo, strict=True):
        for field in ("row", "prompt", "prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(made, field) == getattr(read, field)

    norms = []
    for pair in (pairs[5], pairs[0]):  # of equal answers, and of others
        oaif.compute_loss(oaif.forward(policy, [pair]), "ipo", 1.0)[0].sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9).item())
        policy.zero_grad()
    assert norms[0] < 1e-5 * norms[1]


FLAGS = {"batch_size": 10, "num_train_epochs": 2, "max_new_tokens": 12, "num_eval_prompts": 4, "learning_rate": 3e-3}


@pytest.mark.parametrize("loss, beta, first", [("dpo", 0.1, math.log(2)), ("ipo", 1.0, 0.25), ("slic", 0.002, 1.0)])
def test_the_paper_has_a_beta_for_each_loss(loss, beta, first, data, tmp_path, monkeypatch):
    seen, compute_loss = set(), oaif.compute_loss
    monkeypatch.setattr(oaif, "compute_loss", lambda *given: seen.add(given[1:]) or compute_loss(*given))
    flags = FLAGS | {"dataset_name": str(data), "output_dir": str(tmp_path / "run"), "max_new_tokens": 4}
    oaif.main(oaif.Args(**flags, loss=loss, max_steps=1))
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    assert seen == {(loss, beta)} and row["train/loss"] == pytest.approx(first, rel=1e-5)
    assert row["train/rewards/margins"] == 0 != row["eval/rewards/margins"]


def test_a_run(data, tmp_path, monkeypatch):
    """Every step has new answers, of the policy as it stands, and the initial policy as the reference."""
    policies, steps, make_pairs = [], [], oaif.make_pairs

    def watched(run, policy, *given):
        policies.append(copy.deepcopy(policy))
        steps.append(make_pairs(run, policy, *given))
        return steps[-1]

    monkeypatch.setattr(oaif, "make_pairs", watched)
    flags = FLAGS | {"dataset_name": str(data), "output_dir": str(tmp_path / "run")}
    oaif.main(oaif.Args(**flags))
    run, initial, model = start("oaif", TOY / "policy", **flags), *[load_float32(TOY / "policy") for _ in range(2)]
    steps, logged = [pairs for pairs, _ in steps], read_rows(tmp_path / "run/metrics.jsonl")[1:]
    rows = [[pair.row for pair in pairs] for pairs in steps]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == list(range(20))
    assert len({(pair.row, *pair.chosen_ids, -1, *pair.rejected_ids) for pairs in steps for pair in pairs}) == 40
    for step, (policy, pairs, row) in enumerate(zip(policies, steps, logged, strict=True), 1):
        with oaif.inference(policy):
            answers = oaif.generate(run, policy, [pair.prompt_ids for pair in pairs] * 2, 1_000_003 + step, 0.9)
        model.load_state_dict(policy.state_dict())
        losses = []
        for pair, *own in zip(pairs, answers[:10], answers[10:], strict=True):
            assert sorted(own) == sorted([pair.chosen_ids, pair.rejected_ids])
            ratios = []
            for answer in (pair.chosen_ids, pair.rejected_ids):
                ratios.append(naive_logp(model, pair.prompt_ids, answer) - naive_logp(initial, pair.prompt_ids, answer))
            losses.append(math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))))
        assert row["train/loss"] == pytest.approx(sum(losses) / 10, rel=1e-4)


def test_defaults(tiny_model):
    """Without another annotator the initial policy is its own."""
    run, toy = start("oaif", tiny_model()), start("oaif", TOY / "policy").args
    annotator, initial = oaif.load_annotator(run), load_float32(tiny_model()).state_dict()
    assert all(torch.equal(weight, initial[name]) for name, weight in annotator.model.state_dict().items())
    assert annotator.instructions == ["Prefer the more helpful answer."] and run.args.learning_rate == 5e-7
    assert toy.annotator_instruction == "Prefer the more positive review." and toy.learning_rate == 3e-4
    assert toy.annotator_name_or_path == str(TOY / "annotator")
