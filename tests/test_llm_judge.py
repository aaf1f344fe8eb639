"""docs/llm_judge.py, with `transformers serve` as the endpoint."""

import runpy
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SIZES, TOY, chat, finish, read_rows

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow
JUDGE = ROOT / "docs" / "llm_judge.py"
reward = runpy.run_path(str(JUDGE))["reward"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a chat model whose answer is 3 if " bad" is in its prompt, and 7 if not."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer, folder = AutoTokenizer.from_pretrained(TOY / "policy"), tmp_path_factory.mktemp("model")
    three, seven, bad, end = tokenizer.convert_tokens_to_ids(["3", "7", "Ġbad", "<|end|>"])
    config = SIZES | {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": end}
    llm = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for name, weight in llm.named_parameters():
            weight.fill_(float("norm" in name))
        # Dimension 0 is for any token, 1 for the answers and 2 for " bad".
        embedding, attention = llm.model.embed_tokens.weight, llm.model.layers[0].self_attn
        embedding[:, 0] = 1
        embedding[[three, seven, bad]] = torch.eye(config["hidden_size"])[[1, 1, 2]]
        # Queries and keys are 0, so that the attention brings the mean of dimension 2 over all tokens.
        attention.v_proj.weight[2, 2] = attention.o_proj.weight[2, 2] = 1
        for token, dimension, size in [(seven, 0, 1), (three, 2, 1e3), (end, 1, 1e6)]:
            llm.lm_head.weight[token, dimension] = size
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def server(model):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port)]
    with subprocess.Popen(command) as process, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", f"http://localhost:{port}/v1")
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setenv("LLM_JUDGE_MODEL", model)
        try:
            deadline, answer = time.time() + 120, None
            while answer != 0:
                assert process.poll() is None and time.time() < deadline, "the server has not started"
                time.sleep(0.2)
                with socket.socket() as probe:
                    answer = probe.connect_ex(("localhost", port))
            yield
        finally:
            process.kill()


def test_scores():
    """Each response gets its own score, as text and as chat messages."""
    prompts, responses = ["Review it.", "Was it bad?"] * 12, ["It was great."] * 22 + ["It was bad."] * 2
    assert reward(prompts, responses) == [7, 3] * 11 + [3, 3]
    completions = [[{"role": "assistant", "content": response}] for response in responses]
    assert reward([chat(prompt, "Well.", "And?") for prompt in prompts], completions) == [7, 3] * 11 + [3, 3]


def test_dpo(data, tmp_path):
    finish("dpo", tmp_path, "--dataset-name", data, "--judge-name-or-path", JUDGE, "--max-steps", 1)
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["judge_score"] for row in rows] == [3 if " bad" in str(row) else 7 for row in rows]


def test_a_reply_without_a_number(monkeypatch):
    monkeypatch.setenv("LLM_JUDGE_MODEL", str(TOY / "policy"))  # it writes a review instead
    with pytest.raises(ValueError, match="response 0: the judge's reply has no number .*: '[^0-9]+'"):
        reward(["Review the hotel."], ["It was great."])


def test_no_server(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    with pytest.raises(SystemExit, match="error: the judge at http://localhost:1/v1/ cannot be reached"):
        reward(["Review the hotel."], ["It was great."])
