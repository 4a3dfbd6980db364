"""What holds at every endpoint (bodies, keys, hosts), and those for tokenizers and metrics."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from serving.conftest import asked
from text.chats.chat_template import encode_chat


@pytest.mark.parametrize(
    ("path", "content", "word"),
    [
        ("/v1/chat/completions", b"{", "JSON"),
        ("/v1/chat/completions", b"[]", "JSON object"),
        ("/v1/chat/completions", b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        ("/v1/chat/completions", b'{"model": "one", "temperature": NaN, "messages": [{}]}', "temperature"),
        ("/v1/completions", b'{"model": "one", "prompt": [5, 600]}', "600"),
        ("/v1/completions", b'{"model": "one", "prompt": []}', "prompt"),
        ("/v1/completions", b"[" * 100_000, ""),
        ("/tokenize", b'{"prompt": 5}', "prompt"),
        ("/detokenize", b'{"tokens": [-1]}', "tokens"),
    ],
)
def test_broken_bodies_are_refused_in_one_line(server, path, content, word):
    answer = httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:  # half a character is replaced, as everywhere
        assert answer.status_code == 400 and word in answer.json()["error"]["message"]
        assert "\n" not in answer.json()["error"]["message"]
    assert server.get("/health").text == "ok"


def test_a_key_is_asked_for_everywhere_but_on_the_page(serving):
    import openai

    with serving(api_key="secret") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        for path in ("/metrics", "/tokenizer_info", "/v1/models/one"):
            assert server.get(path).status_code == 401
        assert [server.get(path).status_code for path in ("/", "/health")] == [200, 200]
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
        assert [model.id for model in right.models.list()] == ["one", "two"]


def test_the_remote_tokenizer_of_lm_eval_finds_what_it_asks_for(server, tokenizer):
    text = "你好，Taotao 😀"
    ids = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>") and "<|assistant|>" in info["chat_template"]
    chat = server.post("/tokenize", {"messages": asked("a")}).json()["tokens"]
    assert chat == encode_chat(tokenizer, asked("a"), add_generation_prompt=True)[0]


def test_metrics_count_what_happened(serving):
    with serving() as server:
        server.client().completions.create(model="one", prompt=[20] * 7, max_tokens=5, temperature=0)
        server.client().completions.create(model="one", prompt="a", max_tokens=6, extra_body={"inspect": True})
        page = server.get("/metrics").text
        found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert found['mini_deepseek_prompt_tokens_total{model="one"}'] == "8.0"
        assert 2 <= float(found['mini_deepseek_generated_tokens_total{model="one"}']) <= 11
        assert found['mini_deepseek_requests_total{route="/v1/completions",status="200"}'] == "2.0"
        assert found['mini_deepseek_time_to_first_token_seconds_count{model="one"}'] == "2.0"
        assert found["mini_deepseek_running_requests"] == found["mini_deepseek_waiting_requests"] == "0.0"
        drafted = float(found['mini_deepseek_draft_tokens_total{model="one"}'])
        assert 0 <= float(found['mini_deepseek_accepted_draft_tokens_total{model="one"}']) <= drafted <= 5


def test_other_hosts_and_other_origins_are_refused(serving):
    with serving(hosts=["127.0.0.1", "localhost"], cors=["http://friend.example"]) as server:
        for host, status in (("localhost:80", 200), ("evil.example", 400)):
            assert server.get("/v1/models", headers={"host": host}).status_code == status
        for origin, allowed in (("http://friend.example", True), ("http://evil.example", False)):
            headers = server.get("/v1/models", headers={"origin": origin}).headers
            assert ("access-control-allow-origin" in headers) == allowed
