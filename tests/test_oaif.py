"""OAIF: its losses in closed form, what the annotator is asked, and what becomes of its preferences."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TOY, WORD_COUNT, load_plain, load_script, make_batch, naive_logps, read_rows, start, weights_of

oaif = load_script("oaif")
GOOD = "The rooms were great. The staff was friendly. I would stay there again."
BAD = "The rooms were terrible."
HOTEL = [{"role": "user", "content": "Review the hotel Blue Crown."}]


def asked(prompt, **columns):
    """A pair whose prompt the annotator reads; a Python file also reads the other columns."""
    return oaif.Pair(0, prompt, columns, [], [], [], 1.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_losses_and_gradients(loss):
    batch = make_batch(50)
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
    """By a forward pass of each question by itself, and a softmax over the replies; packed, except for gemma2."""
    run = start("oaif", tiny_model(), annotator_name_or_path=tiny_model(family), micro_batch_tokens=100)
    annotator, model = oaif.load_annotator(run), load_plain(tiny_model(family))
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
    """A tokenizer that splits a 2."""
    folder = shutil.copytree(TOY / "policy", tmp_path / "annotator")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "2"}, "content": "two, that is to say"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    run = start("oaif", TOY / "policy", annotator_name_or_path=str(folder))
    with pytest.raises(SystemExit, match="^error: the annotator's tokenizer does not encode the replies 1 and 2"):
        oaif.ask(run, oaif.load_annotator(run), ["Which?"])


QUESTION = (
    r"(.*)\n\nRequest: (.*)\n\nAnswer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nWhich answer is better\? Reply with 1 or 2\."
)


def test_both_orders_and_all_principles_are_averaged(monkeypatch, tmp_path):
    """Over the lines of the file; the request is a string, a message, or the conversation so far."""
    biases, scores, requests = {"Be kind.": 1.0, "Be brief.": -3.0}, {"good": 2.0, "fair": 0.5, "bad": 0.0}, []

    def ask(run, annotator, questions):
        log_odds = []
        for question in questions:
            principle, request, one, two = re.fullmatch(QUESTION, question, re.DOTALL).groups()
            requests.append(request)
            log_odds.append(biases[principle] + scores[one] - scores[two])
        return torch.tensor(log_odds).sigmoid()

    monkeypatch.setattr(oaif, "ask", ask)
    (tmp_path / "principles.txt").write_text("Be kind.\n\nBe brief.\n")
    run = start("oaif", TOY / "policy", principles=str(tmp_path / "principles.txt"))
    turns = [*HOTEL, {"role": "assistant", "content": "It was great."}, {"role": "user", "content": "Why?"}]
    pairs = [asked("Film?"), asked(HOTEL), asked(turns)]
    orders = oaif.annotate(run, oaif.load_annotator(run), pairs, ["good", "bad", "fair"], ["bad", "good", "bad"])
    for i, gap in enumerate((2, -2, 0.5)):
        forth = sum(sigmoid(bias + gap) for bias in biases.values()) / 2
        back = sum(1 - sigmoid(bias - gap) for bias in biases.values()) / 2
        assert orders[:, i].tolist() == pytest.approx([forth, back])
    conversation = "user: Review the hotel Blue Crown.\n\nassistant: It was great.\n\nuser: Why?"
    assert requests == ["Film?", "Review the hotel Blue Crown.", conversation] * 4


@torch.no_grad()
def test_a_reward_model_as_annotator(tmp_path):
    """By Bradley-Terry: the sigmoid of the difference of the scores, read at the last token, a padding token or not."""
    folder = shutil.copytree(TOY / "judge", tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    run = start("oaif", TOY / "policy", annotator_name_or_path=str(folder))
    annotator, judge = oaif.load_annotator(run), load_plain(TOY / "judge", "SequenceClassification")
    texts = [f"<|user|>{HOTEL[0]['content']}<|assistant|>{answer}<|end|>" for answer in (GOOD, BAD)]
    good, bad = [judge(torch.tensor([annotator.tokenizer.encode(text)])).logits.item() for text in texts]
    orders = oaif.annotate(run, annotator, [asked(HOTEL)] * 2, [GOOD, BAD], [BAD, GOOD])
    assert orders.tolist() == [pytest.approx([sigmoid(good - bad), sigmoid(bad - good)], abs=1e-4)] * 2
    assert good > bad + 0.1


@pytest.mark.parametrize("prompt", ["Film?", HOTEL], ids=["text", "chat"])
def test_a_python_file_as_annotator(tmp_path, prompt):
    """By Bradley-Terry as well, each answer with the columns of its row; the order does not matter to it."""
    (tmp_path / "reward.py").write_text(WORD_COUNT)
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
    """An answer that ended wins against one that did not, in any case. Cut, equal or empty ones are not written."""
    run = start("oaif", TOY / "policy", output_dir=str(tmp_path))
    truths = oaif.encode_rows(run, read_rows(TOY / "train.jsonl")[: len(CASES)], "train")
    columns = list(zip(*CASES, strict=True))
    sides = [[run.tokenizer.encode(text.rstrip("/")) + [0] * (text[-1:] != "/") for text in columns[k]] for k in (0, 1)]
    monkeypatch.setattr(oaif, "generate", lambda *_: sides[0] + sides[1])
    monkeypatch.setattr(oaif, "annotate", lambda *_: torch.tensor(columns[2]).T)
    pairs, metrics = oaif.make_pairs(run, torch.nn.Identity(), None, truths, 3)
    for i, better in enumerate(columns[3]):
        assert pairs[i] == replace(truths[i], chosen_ids=sides[better][i], rejected_ids=sides[1 - better][i])
    assert metrics["train/cut_answers"] == pytest.approx(4 / 14)
    assert metrics["train/equal_answers"] == pytest.approx(1 / 7)
    assert metrics["train/order_agreement"] == pytest.approx(6 / 7)  # all but the pair of two cut answers
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


def test_a_tie_teaches_nothing(tmp_path, monkeypatch):
    run = start("oaif", TOY / "policy", output_dir=str(tmp_path))
    truths = oaif.encode_rows(run, read_rows(TOY / "train.jsonl")[:1], "train")
    monkeypatch.setattr(oaif, "generate", lambda *_: [[5, 0], [6, 0]])
    monkeypatch.setattr(oaif, "annotate", lambda *_: torch.tensor([[0.5], [0.5]]))
    ((pair,), _) = oaif.make_pairs(run, torch.nn.Identity(), None, truths, 3)
    assert pair.chosen_ids == pair.rejected_ids and read_rows(tmp_path / "annotated.jsonl") == []


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
    run, initial, model = start("oaif", TOY / "policy", **flags), load_plain(TOY / "policy"), load_plain(TOY / "policy")
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
                logps, ref_logps = [naive_logps(each, pair.prompt_ids, answer) for each in (model, initial)]
                ratios.append((logps - ref_logps).sum().item())
            losses.append(math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))))
        assert row["train/loss"] == pytest.approx(sum(losses) / 10, rel=1e-4)


def test_the_initial_policy_is_its_own_annotator(tiny_model):
    run = start("oaif", tiny_model())
    annotator, initial = oaif.load_annotator(run), weights_of(tiny_model())
    assert all(torch.equal(weight, initial[name]) for name, weight in annotator.model.named_parameters())
