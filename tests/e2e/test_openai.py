"""The official OpenAI client against a running node."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.node import Node
from tests.support.streams import Stream, client
from tests.support.wait import soon

CHAT, EMBED, RERANK = "org/tiny-chat", "tiny-embed", "tiny-rerank"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(node: Node, models: Path) -> Node:
    node.deploy(CHAT, models / "chat.gguf", categories=["llm"])
    node.deploy(EMBED, models / "embed.gguf", categories=["embedding"])
    node.deploy(RERANK, models / "rerank.gguf", categories=["reranker"])
    return node


@pytest.fixture(scope="module")
def key(served: Node) -> str:
    return served.api_key()


@pytest.fixture(scope="module")
def api(served: Node, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def test_models_are_listed(api: openai.OpenAI) -> None:
    assert {model.id for model in api.models.list()} == {CHAT, EMBED, RERANK}
    assert api.models.retrieve(CHAT).owned_by == "gpustack"


def test_a_chat_completion_counts_its_tokens(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]
    assert answer.choices[0].message.content
    assert answer.model == CHAT
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_a_stream_carries_usage_only_where_it_is_asked_for(api: openai.OpenAI) -> None:
    for wanted in (True, False):
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        chunks = list(
            api.chat.completions.create(
                model=CHAT,
                messages=MESSAGES,
                max_tokens=5,
                stream=True,
                **options,  # type: ignore[call-overload]
            )
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [5] * wanted


def test_plain_completions_work(api: openai.OpenAI) -> None:
    answer = api.completions.create(model=CHAT, prompt="the", max_tokens=3)
    assert answer.choices[0].text


def test_embeddings_have_the_models_width(api: openai.OpenAI) -> None:
    answer = api.embeddings.create(model=EMBED, input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [64, 64]
    assert answer.data[0].embedding != answer.data[1].embedding


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1-openai/rerank", "/v2/rerank"])
def test_rerank_scores_every_document(served: Node, key: str, path: str) -> None:
    with served.http(key) as http:
        body = {"model": RERANK, "query": "what", "documents": ["a", "b", "c"]}
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    assert all("relevance_score" in result for result in results)


def test_the_older_prefix_answers_the_same(served: Node, key: str) -> None:
    older = openai.OpenAI(base_url=f"{served.url}/v1-openai", api_key=key, max_retries=0)
    assert CHAT in {model.id for model in older.models.list()}


def test_a_wrong_key_an_unknown_model_and_a_broken_body_get_openais_errors(
    served: Node, key: str, api: openai.OpenAI
) -> None:
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.status_code == 401
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="nope", messages=MESSAGES)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with served.http(key) as http:
        for body in (b"{", b"[]", b"{}", b'{"model": 7}', b""):
            answer = http.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400, body
            error = answer.json()["error"]
            assert set(error) >= {"message", "type", "param", "code"}
            assert error["message"]


def test_a_key_works_right_after_its_creation_and_not_after_its_deletion(served: Node) -> None:
    with served.http() as admin:
        for number in range(10):
            made = admin.post("/v2/api-keys", json={"name": f"fresh {number}"}).json()
            fresh = openai.OpenAI(base_url=f"{served.url}/v1", api_key=made["value"], max_retries=0)
            assert fresh.models.list().data
            admin.delete(f"/v2/api-keys/{made['id']}").raise_for_status()


def test_what_was_used_is_in_the_database_as_the_engine_counted_it(served: Node) -> None:
    with served.http() as admin:
        made = admin.post("/v2/api-keys", json={"name": "counted"}).json()
    own = openai.OpenAI(base_url=f"{served.url}/v1", api_key=made["value"], max_retries=0)
    chat: Any = own.chat.completions.create
    for stream in (False, True, False):
        answer = chat(model=CHAT, messages=MESSAGES, max_tokens=7, stream=stream)
        assert not stream or list(answer)
    with closing(sqlite3.connect(served.data_dir / "database.db")) as database:
        query = "SELECT completion_tokens, estimated FROM usage WHERE credential_id = ?"

        def used() -> bool:
            return database.execute(query, [made["id"]]).fetchall() == [(7, 0)] * 3

        soon(used, "three requests of seven tokens are there")


@pytest.mark.slow
async def test_200_concurrent_streams_each_get_the_text_that_their_prompt_gets_alone(
    served: Node, key: str
) -> None:
    prompts = [f"tell me about number {number} please" for number in range(200)]
    async with client(served, key) as api:
        alone = [await Stream().run(api, CHAT, prompt, max_tokens=40) for prompt in prompts]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(Stream().run(api, CHAT, prompt, max_tokens=40))
                for prompt in prompts
            ]
    together = [task.result() for task in tasks]
    assert all(stream.whole for stream in together)
    assert len({next(iter(stream.ids)) for stream in together}) == 200
    assert len({stream.text for stream in alone}) > 20  # the prompts do matter
    assert [stream.text for stream in together] == [stream.text for stream in alone]
