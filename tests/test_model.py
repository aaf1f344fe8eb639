"""Log-probabilities, sampling and judging against plain computations, on tiny random models."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
import transformers
from conftest import FAMILIES, load_script

dpo = load_script("pre_dpo")

CAUSAL = [family for family in FAMILIES if family != "bert"]
LOSS = partial(dpo.compute_loss, beta=0.5, label_smoothing=0.1)


def random_ids(*lengths, seed=0):
    """Rows of token ids, some of them 0 and 1, which are the end and the padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 900, (length,), generator=generator).tolist()[:-1] + [0] for length in lengths]


PROMPTS, COMPLETIONS = random_ids(5, 1, 12, 7, 3, 9), random_ids(6, 9, 1, 14, 2, 8, seed=1)


def load_naively(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def naive_token_logps(model, prompt, completion):
    """All logits of one row, with an attention mask."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
    return logps[0, :-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


def make_pairs(count=7):
    lengths = [(4 + 3 * i % 11, 2 + 5 * i % 13, 1 + 7 * i % 9) for i in range(count)]
    pairs = [dpo.Pair(i, "", *random_ids(*row, seed=i)) for i, row in enumerate(lengths)]
    for i, pair in enumerate(pairs):
        pair.ref_chosen_logps, pair.ref_rejected_logps = -40.0 + 3 * i, -30.0 - 2 * i
        pair.preference_prob = [1.0, 0.8][i % 2]
    return pairs


# === Log-probabilities ===


@pytest.mark.parametrize("family", CAUSAL)
def test_logps_and_their_gradients_are_those_of_full_logits(start, tiny_model, family):
    path = tiny_model(family)
    _, model = start(dpo, path)
    naive = load_naively(path)
    rows = [naive_token_logps(naive, *row) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    logps = dpo.token_logps(model, PROMPTS, COMPLETIONS)
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert logps.dtype == torch.float32 and logps.shape == (6, 14)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=2e-5)
    assert all((logps[i, len(row) :] == 0).all() for i, row in enumerate(rows))

    sums = dpo.sequence_logps(model, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(sums, torch.stack([row.sum() for row in rows]), rtol=1e-5, atol=1e-4)
    weights = torch.arange(1.0, 7.0)  # another for each row
    assert_same_gradients(
        gradients(model, weights @ sums), gradients(naive, sum(weights * torch.stack([r.sum() for r in rows])))
    )


@pytest.mark.parametrize(
    "family, field", [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling"), ("cohere", "logit_scale")]
)
def test_the_families_scale_and_cap_their_logits(tiny_model, family, field):
    """Else the test above would prove less than it says."""
    model = load_naively(tiny_model(family))
    ids = torch.tensor([PROMPTS[0]])
    plain = model.lm_head(model.model(ids).last_hidden_state)
    assert (plain - model(ids).logits).abs().max() > 0.1, field


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logps_do_not_depend_on_order_and_padding(start, tiny_model, family):
    _, model = start(dpo, tiny_model(family))
    together = dpo.sequence_logps(model, PROMPTS, COMPLETIONS)
    alone = torch.cat([dpo.sequence_logps(model, [p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    turned = dpo.sequence_logps(model, PROMPTS[::-1], COMPLETIONS[::-1]).flip(0)
    longer = dpo.sequence_logps(model, [*PROMPTS, *random_ids(40)], [*COMPLETIONS, *random_ids(50)])[:-1]
    for other in (alone, turned, longer):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-4)


def test_the_head_is_left_as_it_was(start, tiny_model):
    _, model = start(dpo, tiny_model())
    dpo.token_logps(model, PROMPTS, COMPLETIONS)
    assert model(input_ids=torch.tensor([PROMPTS[0]])).logits.shape == (1, len(PROMPTS[0]), 900)
    with pytest.raises(IndexError):
        dpo.token_logps(model, [[900]], [[0]])
    assert model(input_ids=torch.tensor([PROMPTS[0]])).logits.shape == (1, len(PROMPTS[0]), 900)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_of_a_step_does_not_depend_on_the_cut(start, tiny_model, family):
    results, pairs = [], make_pairs()
    for tokens, order in ((10**6, 1), (1, 1), (90, 1), (90, -1)):
        run, policy = start(dpo, tiny_model(family), micro_batch_tokens=tokens)
        table = dpo.score_pairs(run, policy.train(), pairs[::order], LOSS)
        results.append(({name: v[::order] if order == 1 else v.flip(0) for name, v in table.items()}, policy))
    (first, first_policy), *others = results
    expected = {name: weight.grad for name, weight in first_policy.named_parameters()}
    for table, policy in others:
        for name, values in first.items():
            torch.testing.assert_close(table[name], values, rtol=1e-5, atol=1e-5)
        assert_same_gradients({name: weight.grad for name, weight in policy.named_parameters()}, expected)


def test_gradient_of_a_step_is_that_of_the_mean_loss(start, tiny_model):
    run, policy = start(dpo, tiny_model(), micro_batch_tokens=90)
    naive, pairs = load_naively(tiny_model()), make_pairs()
    table = dpo.score_pairs(run, policy, pairs, LOSS)
    losses = []
    for pair in pairs:
        chosen, rejected = (
            naive_token_logps(naive, pair.prompt_ids, c).sum() for c in (pair.chosen_ids, pair.rejected_ids)
        )
        h = chosen - pair.ref_chosen_logps - rejected + pair.ref_rejected_logps
        p = pair.preference_prob * 0.9 + (1 - pair.preference_prob) * 0.1
        losses.append(-p * torch.sigmoid(0.5 * h).log() - (1 - p) * torch.sigmoid(-0.5 * h).log())
    torch.testing.assert_close(table["loss"], torch.stack(losses).detach(), rtol=1e-5, atol=1e-5)
    expected = gradients(naive, sum(losses) / len(losses))
    assert_same_gradients({name: weight.grad for name, weight in policy.named_parameters()}, expected)


def test_gradient_checkpointing_changes_nothing(start, tiny_model):
    tables, policies = [], []
    for checkpointing in (False, True):
        run, policy = start(dpo, tiny_model(), gradient_checkpointing=checkpointing)
        policies.append(policy.train())
        tables.append(dpo.score_pairs(run, policy, make_pairs(), LOSS))
        assert any(getattr(module, "gradient_checkpointing", False) for module in policy.modules()) is checkpointing
    torch.testing.assert_close(tables[0], tables[1])
    plain, checkpointed = ({name: w.grad for name, w in policy.named_parameters()} for policy in policies)
    assert_same_gradients(checkpointed, plain)


def test_no_gradient_where_gradients_are_off(start, tiny_model):
    run, policy = start(dpo, tiny_model())
    with torch.no_grad():
        dpo.score_pairs(run, policy, make_pairs(), LOSS)
    assert all(weight.grad is None for weight in policy.parameters())


def test_dropout_is_off(start, tiny_model):
    _, model = start(dpo, tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    expected = dpo.sequence_logps(model, PROMPTS, COMPLETIONS)
    assert torch.equal(dpo.sequence_logps(model.train(), PROMPTS, COMPLETIONS), expected)


def test_dropout_of_lora_is_off(start, tiny_model):
    _, model = start(dpo, tiny_model(), lora_rank=2)
    expected = dpo.sequence_logps(model.eval(), PROMPTS, COMPLETIONS)
    assert torch.equal(dpo.sequence_logps(model.train(), PROMPTS, COMPLETIONS), expected)
    torch.testing.assert_close(expected, dpo.sequence_logps(load_naively(tiny_model()), PROMPTS, COMPLETIONS))


def test_reference_is_computed_once_and_then_read(start, tiny_model):
    run, policy = start(dpo, tiny_model())
    pairs = make_pairs()
    dpo.add_reference(run, policy, [pairs[:3], pairs[2:]], "reference_logps")
    naive = load_naively(tiny_model())
    for pair in pairs:
        for ids, value in ((pair.chosen_ids, pair.ref_chosen_logps), (pair.rejected_ids, pair.ref_rejected_logps)):
            assert value == pytest.approx(naive_token_logps(naive, pair.prompt_ids, ids).sum().item(), rel=1e-5)
    with torch.no_grad():
        next(policy.parameters()).zero_()
    again = make_pairs()
    dpo.add_reference(run, policy, [again[:3], again[2:]], "reference_logps")
    assert again == pairs


# === Sampling ===


@pytest.fixture
def sampler(start, tiny_model, monkeypatch):
    """A run whose model often stops, and what the sampling forwards saw: (input ids, scores) of each token."""

    def make(family="llama", **flags):
        run, policy = start(dpo, tiny_model(family), **{"max_new_tokens": 24} | flags)
        run.stop_ids = [0, *range(500, 560)]
        return run, policy, seen

    seen, own_call = [], dpo.InverseCDF.__call__

    def call(self, input_ids, scores):
        seen.append((input_ids.clone(), scores.clone()))
        return own_call(self, input_ids, scores)

    monkeypatch.setattr(dpo.InverseCDF, "__call__", call)
    return make


MANY_PROMPTS = random_ids(*range(1, 21), seed=3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_samples_have_the_same_logps_in_training(sampler, family):
    run, policy, seen = sampler(family, micro_batch_tokens=10**6)
    responses = dpo.generate(run, MANY_PROMPTS, 1.0, seed=5)
    logps = dpo.token_logps(policy, MANY_PROMPTS, responses)
    width = seen[0][0].shape[1]
    rows = [row.tolist() for row in seen[0][0]]
    for i, (prompt, response) in enumerate(zip(MANY_PROMPTS, responses, strict=True)):
        row = rows.index([0] * (width - len(prompt)) + prompt)
        for k, token in enumerate(response):
            expected = seen[k][1][row].float().log_softmax(-1)[token]
            assert logps[i, k].item() == pytest.approx(expected.item(), abs=1e-4)


def test_samples_end_at_their_first_stop_token(sampler):
    run, _, _ = sampler(max_new_tokens=6)
    responses = dpo.generate(run, MANY_PROMPTS, 1.0, seed=5)
    ended = [response[-1] in run.stop_ids for response in responses]
    assert any(ended) and not all(ended) and {response[-1] for response in responses} & set(range(500, 560))
    for response in responses:
        assert not set(response[:-1]) & set(run.stop_ids)
        assert len(response) == 6 or response[-1] in run.stop_ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_samples_do_not_depend_on_the_batches(sampler, family):
    run, _, _ = sampler(family, micro_batch_tokens=10**6)
    responses = dpo.generate(run, MANY_PROMPTS, 1.0, seed=5)
    for tokens in (1, 40):
        run.micro_batch_tokens = tokens
        assert dpo.generate(run, MANY_PROMPTS, 1.0, seed=5) == responses
    assert dpo.generate(run, MANY_PROMPTS[:7], 1.0, seed=5) == responses[:7]  # the same luck, and other neighbours
    assert dpo.generate(run, MANY_PROMPTS, 1.0, seed=6) != responses


def test_uniform_numbers_pick_tokens_in_proportion():
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0, -30.0, 0.0])
    count = 20_000
    for temperature in (0.5, 1.0, 2.0):
        uniforms = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
        picker = dpo.InverseCDF(uniforms, prompt_length=3, temperature=temperature)
        scores = picker(torch.zeros(count, 3, dtype=torch.long), logits.expand(count, -1))
        assert torch.equal(scores.isfinite().sum(-1), torch.ones(count, dtype=torch.long))
        shares = scores.argmax(-1).bincount(minlength=6) / count
        expected = (logits / temperature).softmax(-1)
        assert ((shares - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-4).all()


def test_extreme_uniform_numbers_pick_possible_tokens():
    uniforms = torch.tensor([[0.0], [1 - 2**-24]])
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]]).expand(2, -1)
    scores = dpo.InverseCDF(uniforms, 1, 1.0)(torch.zeros(2, 1, dtype=torch.long), logits)
    assert scores.argmax(-1).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_model_s_probabilities(start, tiny_model, temperature):
    count = 6000
    run, policy = start(dpo, tiny_model(), max_new_tokens=2, micro_batch_tokens=4000)
    responses = dpo.generate(run, [PROMPTS[0]] * count, temperature, seed=0)
    probs = (load_naively(tiny_model())(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    shares = torch.tensor([response[0] for response in responses]).bincount(minlength=900) / count
    assert ((shares - probs).abs() < 5 * (probs * (1 - probs) / count).sqrt() + 2 / count).all()
    common = probs > 5 / count
    chi_square = count * ((shares - probs)[common] ** 2 / probs[common]).sum().item()
    assert abs(chi_square - common.sum()) < 5 * math.sqrt(2 * common.sum())


def test_the_model_s_own_generation_config_has_no_influence(sampler):
    run, policy, _ = sampler()
    expected = dpo.generate(run, MANY_PROMPTS, 1.0, seed=5)
    own = transformers.GenerationConfig(
        do_sample=True, repetition_penalty=5.0, top_k=1, top_p=0.1, temperature=0.1, min_new_tokens=20, eos_token_id=7
    )
    policy.generation_config = own
    assert dpo.generate(run, MANY_PROMPTS, 1.0, seed=5) == expected
    assert policy.generation_config is own and own.repetition_penalty == 5.0


def test_stop_tokens_are_the_tokenizer_s_and_the_model_s(start, tiny_copy):
    folder = tiny_copy()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    run, _ = start(dpo, str(folder))
    assert run.stop_ids[0] == 0 and set(run.stop_ids) == {0, 7, 9}


# === Judging ===

CONVERSATION = [
    {"role": "user", "content": "Review the hotel."},
    {"role": "assistant", "content": "Which?"},
    {"role": "user", "content": "The big one."},
]
QUESTIONS = [
    CONVERSATION,
    CONVERSATION[:1],
    "Review the film, please, and be long about it.",
    CONVERSATION[2:],
    "Soup?",
]
ANSWERS = ["It was great. I liked it very much, and the staff too.", "", "Dull.", "Bad " * 30, "It is a soup."]


def read_last_token(path, text):
    """Score of one text, whatever the classifier takes for padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[0, -1]).item()


def as_messages(prompt):
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


JUDGE_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize("pad", [1, 0, None, 317], ids=["own padding", "pad is eos", "no padding", "pad is a word"])
@pytest.mark.parametrize("template", [None, JUDGE_TEMPLATE], ids=["same template", "another template"])
def test_judge_scores_as_one_row_at_a_time(start, tiny_model, tiny_copy, template, pad):
    path = tiny_copy("llama-untied", "SequenceClassification", num_labels=1, pad_token_id=pad)
    if template:
        (path / "chat_template.jinja").write_text(template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    expected = []
    for prompt, answer in zip(QUESTIONS, ANSWERS, strict=True):
        messages = [*as_messages(prompt), {"role": "assistant", "content": answer}]
        expected.append(read_last_token(path, tokenizer.apply_chat_template(messages, tokenize=False)))
    for tokens in (10**6, 1):
        run, _ = start(dpo, tiny_model(), micro_batch_tokens=tokens)
        assert dpo.judge(run, *dpo.load_judge(run, str(path)), QUESTIONS, ANSWERS) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == len(expected)


def test_judge_with_another_tokenizer(start, tiny_model, tiny_copy):
    """Trained on other text, and with a token before each text that its template writes too."""
    from tokenizers.processors import TemplateProcessing

    path = tiny_copy("qwen3", "SequenceClassification", num_labels=1, vocab_size=400)
    old = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = old.train_new_from_iterator(["The staff was kind. The soup is cold, but the film was long."] * 20, 300)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    special = [("<|start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=special)
    tokenizer.chat_template = "<|start|>" + JUDGE_TEMPLATE
    shutil.rmtree(path / "tokenizer.json", ignore_errors=True)
    tokenizer.save_pretrained(path)
    assert len(tokenizer) < 400 and tokenizer("It was great.").input_ids != old("It was great.").input_ids
    texts = []
    for prompt, answer in zip(QUESTIONS, ANSWERS, strict=True):
        messages = [*as_messages(prompt), {"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False).removeprefix("<|start|>"))
        assert tokenizer(texts[-1]).input_ids.count(tokenizer.bos_token_id) == 1
    expected = [read_last_token(path, text) for text in texts]
    run, _ = start(dpo, tiny_model())
    assert dpo.judge(run, *dpo.load_judge(run, str(path)), QUESTIONS, ANSWERS) == pytest.approx(expected, abs=1e-4)
    # A tokenizer that leaves this token to the template.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(path)
    assert tokenizer("<|start|>a").input_ids.count(tokenizer.bos_token_id) == 1 and not tokenizer("").input_ids
    assert dpo.judge(run, *dpo.load_judge(run, str(path)), QUESTIONS, ANSWERS) == pytest.approx(expected, abs=1e-4)


def test_judge_without_a_template_reads_question_and_answer(start, tiny_model, tiny_copy):
    """As reward models on top of encoders do."""
    path = tiny_copy("bert", "SequenceClassification", num_labels=1, type_vocab_size=1)
    (path / "chat_template.jinja").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    questions = ["Review the hotel.", "Soup?", "Review the film, please, and be long about it."]
    with torch.no_grad():
        pairs = [tokenizer(*pair, return_tensors="pt").input_ids for pair in zip(questions, ANSWERS[2:], strict=True)]
        expected = [model(ids).logits.item() for ids in pairs]
    run, _ = start(dpo, tiny_model())
    assert dpo.judge(run, *dpo.load_judge(run, str(path)), questions, ANSWERS[2:]) == pytest.approx(expected, abs=1e-4)
