from __future__ import annotations

import pytest
from shelf import Shelf
from starlette.testclient import TestClient

from mvrec_core.errors import ConfigError
from serve.api import create_api
from serve.keys import read_keys

FIRST, SECOND = "a-key-of-letters-1", "a-key-of-letters-2"


@pytest.fixture
def client(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# the shop\n{FIRST}\n\n{SECOND}\n")
    shelf = Shelf()
    shelf.keys = read_keys(str(file))
    return TestClient(create_api(shelf, 64, 10.0))


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {FIRST}"}, {"authorization": f"bearer  {SECOND}"}, {"X-API-Key": SECOND}]
)
def test_who_has_a_key_is_let_in(client, headers):
    assert client.post("/v1/recommend", json={"k": 1}, headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": FIRST[:-1]},
        {"X-API-Key": ""},
        {"Authorization": FIRST},
        {"Authorization": "Bearer 钥匙".encode()},
    ],
)
def test_who_has_none_is_not(client, headers):
    refused = client.post("/v1/recommend", json={"k": 1}, headers=headers)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["code"] == "unauthorized"
    assert client.get("/metrics", headers=headers).status_code == 401
    assert client.get("/v1/users", headers=headers).status_code == 401


def test_health_and_pages_are_open(client):
    for path in ("/health/live", "/health/ready", "/", "/docs", "/openapi.json", "/page/app.js"):
        assert client.get(path).status_code == 200


def test_the_interface_says_so(client):
    api = client.get("/openapi.json").json()
    operation = api["paths"]["/v1/recommend"]["post"]
    assert operation["security"] == [{"bearer": []}, {"key": []}] and "401" in operation["responses"]
    assert api["components"]["securitySchemes"]["key"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    assert "security" not in api["paths"]["/health/live"]["get"]
    free = TestClient(create_api(Shelf(), 64, 10.0)).get("/openapi.json").json()
    assert "securitySchemes" not in free["components"]


def test_keys_of_the_environment(monkeypatch):
    assert read_keys(None) == []
    monkeypatch.setenv("MVREC_API_KEYS", f" {FIRST},{SECOND},")
    assert read_keys(None) == [FIRST, SECOND]


@pytest.mark.parametrize("text", ["short\n", f"{FIRST} {SECOND}\n", "一把足够长的钥匙一把足够长的钥匙\n", "# none\n"])
def test_a_bad_file_is_one_sentence_without_the_key(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="serve.api_keys") as refused:
        read_keys(str(file))
    assert text.strip() not in str(refused.value) and str(refused.value).count("\n") == 0
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError") as refused:
        read_keys(FIRST)
    assert FIRST not in str(refused.value)
