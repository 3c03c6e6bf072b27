"""The interface does what /openapi.json says, whatever is sent: a replica's routes in this process, without Ray."""

from __future__ import annotations

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.app import Replica

EXAMPLES = 15  # of each operation and mode
OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/score"),
    ("GET", "/v1/similar/{item_id}"),
    ("POST", "/v1/similar"),
    ("POST", "/v1/events"),
    ("DELETE", "/v1/users/{user_id}/events"),
    ("PUT", "/v1/items"),
    ("DELETE", "/v1/items"),
    ("DELETE", "/v1/items/{item_id}"),
    ("GET", "/v1/users"),
    ("GET", "/v1/users/{user_id}/history"),
    ("GET", "/v1/versions"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]
TAKE_ANYTHING = [("DELETE", "/v1/items/{item_id}"), *OPERATIONS[-4:]]
OF_THE_CATALOGUE = r"(k|filter\.(categories|ranges)\..*|caps\..*|rating|year)$"


@pytest.fixture(scope="module")
def interface(plain_checkpoint, tmp_path_factory):
    replica = Replica(str(plain_checkpoint), {"state_dir": str(tmp_path_factory.mktemp("state"))})
    return schemathesis.openapi.from_asgi("/openapi.json", replica.__serve_build_asgi_app__())


def test_every_operation_is_tried(interface):
    described = [(found.ok().method.upper(), found.ok().path) for found in interface.get_all_operations()]
    assert sorted(described) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_is_described_is_answered_as_described(interface, method, path):
    """Of a request that the description allows, only what it cannot know may be refused: what this catalogue has."""

    def every(case):
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        if response.status_code == 422:
            assert re.match(OF_THE_CATALOGUE, response.json()["error"]["field"])
        else:
            assert response.status_code in (200, 404)

    tried(interface[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE), every)


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one not in TAKE_ANYTHING])
def test_what_is_not_described_is_refused_as_described(interface, method, path):
    tried(
        interface[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE),
        lambda case: case.call_and_validate(),
    )


def tried(cases, check):
    @given(case=cases)
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def every(case):
        check(case)

    every()
