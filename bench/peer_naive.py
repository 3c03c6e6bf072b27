"""The same model in a plain FastAPI app that answers one request at a time: `python bench/peer_naive.py DIR PORT`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response

from mvrec_core.errors import RequestError
from mvrec_core.recommender import Recommender
from serve.answers import as_json, recommend_values
from serve.schema import RecommendBody


def app(recommender: Recommender) -> FastAPI:
    api = FastAPI()

    @api.post("/v1/recommend")
    async def recommend(body: RecommendBody) -> Response:
        (answer,) = recommender.recommend([body.request()])
        if isinstance(answer, RequestError):
            raise answer
        return Response(as_json(recommend_values(recommender.model_version, answer)), media_type="application/json")

    return api


class Told(uvicorn.Server):
    """Says when it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print("Ready", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    api = app(Recommender.load(sys.argv[1]))
    Told(uvicorn.Config(api, port=int(sys.argv[2]), log_level="warning", access_log=False)).run()
