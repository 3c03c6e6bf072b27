"""The routes, over any backend that can recommend: no Ray in here, so that they can be tested in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from mvrec_core.errors import Overloaded, RequestError, StateUnavailable
from mvrec_core.requests import Candidate, Item, Request
from serve.answers import (
    JSON,
    ErrorAnswer,
    EventsAnswer,
    ForgottenAnswer,
    HealthAnswer,
    HistoryAnswer,
    ItemsAnswer,
    RecommendAnswer,
    ScoreAnswer,
    SimilarAnswer,
    UsersAnswer,
    VersionsAnswer,
    error_values,
)
from serve.keys import Keys, describe
from serve.limits import RECOMMEND, Limits, overloaded
from serve.metrics import CONTENT_TYPE
from serve.schema import (
    MAX_ITEMS,
    MAX_LIVE_EVENTS,
    EventsBody,
    ItemsBody,
    ModelVersion,
    RecommendBody,
    ScoreBody,
    SimilarBody,
    explain,
)
from serve.sessions import LiveEvent
from serve.watch import Watch, Watching

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {  # the page needs nothing from elsewhere and runs no script but its own
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
CODES = {
    400: "invalid_json",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_long",
    422: "invalid_request",
    507: "too_many_items",
}
BODIES: dict[str, type[BaseModel]] = {
    "/v1/recommend": RecommendBody,
    "/v1/score": ScoreBody,
    "/v1/similar": SimilarBody,
    "/v1/items": ItemsBody,
    "/v1/events": EventsBody,
}

Count = Annotated[int, Query(ge=1)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Backend(Protocol):
    """What the routes call. Answers about users come as JSON, since they are kept as such. A RequestError becomes the
    HTTP answer that it names, a StateUnavailable or Overloaded becomes 503."""

    watch: Watch
    keys: Sequence[str]  # one of which a request has to carry; none: it need not

    @property
    def model_version(self) -> str: ...

    @property
    def n_items(self) -> int: ...

    def versions(self) -> list[dict[str, Any]]: ...

    def overload(self) -> Overloaded | None: ...

    async def recommend(self, request: Request) -> bytes: ...

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> bytes: ...

    async def similar(self, item_id: str, request: Request) -> bytes: ...

    async def put_items(self, items: Sequence[Item]) -> dict[str, Any]: ...

    async def remove_items(self, item_ids: Sequence[str]) -> dict[str, Any]: ...

    async def history(self, user_id: str, limit: int) -> bytes: ...

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> bytes: ...

    async def forget(self, user_id: str, event_ids: Sequence[str] | None) -> bytes: ...

    async def users(self, prefix: str, limit: int) -> list[str]: ...


class PageFiles(StaticFiles):
    """Asked for anew by every browser, so that files of two releases never meet in one page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


class AnyId(PathConvertor):
    """Any id in a path, line breaks included, which "path" leaves out."""

    regex = r"(?s:.*)"


class BodyRoutes:
    """A plain ASGI middleware that answers requests with a body as their routes say, without FastAPI's way to a route,
    which takes as long as an answer that is remembered. FastAPI describes these routes, and answers the others.

    To be the innermost one: the body is in scope["body"]. Its content type does not matter, because `curl -d` without a
    header calls it a form.
    """

    def __init__(self, app: ASGIApp, api: FastAPI):
        self.app = app
        self._routes = {
            (route.path, method): route
            for route in api.routes
            if isinstance(route, APIRoute) and route.body_field is not None
            for method in route.methods or ()
        }
        handlers = {kind: handler for kind, handler in api.exception_handlers.items() if kind is not Exception}
        self._answering = ExceptionMiddleware(_answer, handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope.get("path", ""), scope.get("method", "")))
        if route is None:
            await self.app(scope, receive, send)
        else:
            scope["route"] = route
            await self._answering(scope, receive, send)


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    route: APIRoute = scope["route"]
    http = route.dependant.request_param_name
    body = read_body(BODIES[route.path], scope["body"])
    response: Response = await route.endpoint(body, **({} if http is None else {http: HttpRequest(scope)}))
    await response(scope, receive, send)


def read_body(model: type[BaseModel], body: bytes) -> BaseModel:
    """Raises what FastAPI would raise."""
    if not body:
        raise RequestValidationError([{"type": "missing", "loc": ("body",)}])
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except (ValueError, RecursionError):
        raise HTTPException(400) from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def create_api(
    backend: Backend, max_in_flight: int, timeout_s: float, lifespan: Lifespan[FastAPI] | None = None
) -> FastAPI:
    """The ASGI application: at most `max_in_flight` requests at a time, each answered within `timeout_s` seconds."""
    register_url_convertor("id", AnyId())
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in (400, 413, 422, 503)}
    api = FastAPI(
        title="MVRec",
        description="Recommendations from several views of one behaviour sequence.",
        version="1",  # of the interface, as in its paths: models come and go
        responses=refusals,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its script from another host
        redoc_url=None,
    )
    api.add_middleware(BodyRoutes, api=api)
    api.add_middleware(Limits, max_in_flight=max_in_flight, timeout_s=timeout_s, overload=backend.overload)
    if backend.keys:
        api.add_middleware(Keys, keys=backend.keys)
    api.add_middleware(Watching, watch=backend.watch)  # the last one is the outermost
    _answer_errors(api)
    _add_model_routes(api, backend)
    _add_item_routes(api, backend)
    _add_user_routes(api, backend)
    _add_health_routes(api, backend)
    _add_pages(api)
    if backend.keys:
        described = describe(api.openapi())
        api.openapi = lambda: described  # type: ignore[method-assign]
    return api


def _add_model_routes(api: FastAPI, backend: Backend) -> None:
    strangers: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}  # versions, items

    @api.post(RECOMMEND, response_model=RecommendAnswer, responses=strangers)
    async def recommend(body: RecommendBody, http: HttpRequest) -> Response:
        """The k best items for a user, best first."""
        http.scope["k"] = body.k
        return JSON(await backend.recommend(body.request()))

    @api.post("/v1/score", response_model=ScoreAnswer, responses=strangers)
    async def score(body: ScoreBody) -> Response:
        """Score and probability of each candidate for a user, in the order of the candidates."""
        return JSON(await backend.score(*body.request()))

    @api.get("/v1/similar/{item_id:id}", response_model=SimilarAnswer, responses=strangers)
    async def similar(item_id: str, k: Count = 10, model_version: ModelVersion | None = None) -> Response:
        """The k items nearest to an item."""
        return await nearest(item_id, Request(k=k, model_version=model_version))

    @api.post("/v1/similar", response_model=SimilarAnswer, responses=strangers)
    async def similar_of(body: SimilarBody) -> Response:
        """The same with filters, diversity and caps."""
        return await nearest(body.item_id, body.request())

    @api.get("/v1/versions", response_model=VersionsAnswer)
    async def versions() -> Response:
        """The versions that answer, and those that are to."""
        return JSON({"versions": backend.versions()})

    async def nearest(item_id: str, request: Request) -> Response:
        return JSON(await backend.similar(item_id, request))


def _add_item_routes(api: FastAPI, backend: Backend) -> None:
    strangers: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}

    @api.put("/v1/items", response_model=ItemsAnswer, responses={507: {"model": ErrorAnswer}})
    async def put(body: ItemsBody) -> Response:
        """Add items, or change them: they can be recommended at once, by what they are. A new item's columns are all
        that is known of it; one of the catalogue keeps what was learnt from its events."""
        return JSON(await backend.put_items(body.changes()))

    @api.delete("/v1/items", response_model=ItemsAnswer, responses=strangers)
    async def remove_several(item_id: Annotated[list[str], Query(min_length=1, max_length=MAX_ITEMS)]) -> Response:
        """Recommend none of these items any more."""
        return JSON(await backend.remove_items(item_id))

    @api.delete("/v1/items/{item_id:id}", response_model=ItemsAnswer, responses=strangers)
    async def remove(item_id: str) -> Response:
        """Recommend an item no more; in histories it still counts."""
        return JSON(await backend.remove_items([item_id]))


def _add_user_routes(api: FastAPI, backend: Backend) -> None:
    @api.get("/v1/users", response_model=UsersAnswer)
    async def users(prefix: str = "", limit: Limit = 20) -> Response:
        """Known users whose id begins with `prefix`."""
        return JSON({"users": await backend.users(prefix, limit)})

    @api.get("/v1/users/{user_id:id}/history", response_model=HistoryAnswer, responses={404: {"model": ErrorAnswer}})
    async def history(user_id: str, limit: Limit = 50) -> Response:
        """The newest events of a user, live ones included."""
        return JSON(await backend.history(user_id, limit))

    @api.post("/v1/events", response_model=EventsAnswer)
    async def append(body: EventsBody) -> Response:
        """Append events to the live history of a user, who need not be known; the next answer rests on them."""
        return JSON(await backend.append(body.user_id, body.live_events(time.time())))

    @api.delete("/v1/users/{user_id:id}/events", response_model=ForgottenAnswer)
    async def forget(
        user_id: str,
        event_id: Annotated[list[str], Query(max_length=MAX_LIVE_EVENTS)] = [],  # noqa: B006
    ) -> Response:
        """Forget live events of a user: those of some names, or all. What a model was trained on stays in it."""
        return JSON(await backend.forget(user_id, event_id or None))


def _add_health_routes(api: FastAPI, backend: Backend) -> None:
    @api.get("/health/live", response_model=HealthAnswer)
    async def live() -> Response:
        """The process answers."""
        return JSON({"status": "live"})

    @api.get("/health/ready", response_model=HealthAnswer)
    async def ready() -> Response:
        """The model is loaded."""
        return JSON({"status": "ready", "model_version": backend.model_version, "items": backend.n_items})

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus: the metrics of all replicas, whichever answers."""
        return Response(await backend.watch.page(), headers={"content-type": CONTENT_TYPE})


def _add_pages(api: FastAPI) -> None:
    async def index(_: HttpRequest) -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    async def docs(_: HttpRequest) -> Response:
        return FileResponse(PAGE / "docs.html", headers=PAGE_HEADERS)

    api.add_route("/", index, include_in_schema=False)
    api.add_route("/docs", docs, include_in_schema=False)
    api.mount("/page", PageFiles(directory=PAGE))


def _answer_errors(api: FastAPI) -> None:
    """Every error leaves as {"error": {"code", "message", "field"}}."""

    @api.exception_handler(RequestError)
    async def request_error(_: HttpRequest, error: RequestError) -> Response:
        return _error(error.status, str(error), error.field)

    @api.exception_handler(StateUnavailable)
    async def state_unavailable(_: HttpRequest, error: StateUnavailable) -> Response:
        return JSON(error_values("state_unavailable", str(error)), 503, {"retry-after": "1"})

    @api.exception_handler(Overloaded)
    async def too_much(_: HttpRequest, error: Overloaded) -> Response:
        return overloaded(error)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
        return _error(422, *explain(first, BODIES.get(request.url.path)))

    @api.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> Response:
        messages = {
            400: "the body is not valid JSON in UTF-8",
            404: f"there is nothing at {request.url.path}; /docs lists what there is",
            405: f"{request.method} is not possible at {request.url.path}",
        }
        return _error(error.status_code, messages.get(error.status_code, str(error.detail)), headers=error.headers)

    @api.exception_handler(Exception)
    async def unexpected(_: HttpRequest, error: Exception) -> Response:
        return JSON(error_values("internal", "the request failed inside the service; its log says why"), 500)


def _error(status: int, message: str, field: str | None = None, headers: Any = None) -> Response:
    return JSON(error_values(CODES.get(status, "error"), message, field), status, headers)
