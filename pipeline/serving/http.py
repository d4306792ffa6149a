"""The HTTP interface of a served model: request formats, size limits, the token, and JSON answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.serving.pyfunc import IMAGE_COLUMN, OUTPUT_COLUMNS, PARAMS, given_params

FORMS = ("dataframe_records", "dataframe_split", "instances", "inputs")
"""The top-level keys of MLflow's JSON request formats."""
POLICY_PARAMS = {
    "budget": "budget_gflops",
    "budget_gflops": "budget_gflops",
    "budget_bias": "budget_bias",
    "max_accuracy_drop": "max_accuracy_drop",
}
"""Maps a query parameter that selects the policy to the parameter of `RoutedNetwork.policy_for`. A header such as
x-budget sets the same parameter."""
POLICY = "policy"
MODEL_HEADER = "x-model"
RETRY_SECONDS = 1
PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
}
Handler = Callable[[Request], Awaitable[Response]]
log = logging.getLogger("ray.serve")


class UnavailableError(Exception):
    """A part of the model cannot be reached now. The same request may succeed later."""


class ServedModel(Protocol):
    """The interface of a loaded model that the HTTP application needs."""

    address: str
    """`models:/NAME/VERSION`."""

    def about(self) -> dict[str, Any]:
        """Return a description of the model as JSON values."""
        ...

    def policy(self, name: str | None, given_params: Mapping[str, float]) -> Any:
        """Return a policy by its name or by parameters. Raise ValueError if there is no such policy."""
        ...

    def classify(self, images: Sequence[Any], policy: Any, stop: threading.Event) -> list[Any]:
        """Return a runtime.Answer for each image. After `stop` is set, return soon, possibly with fewer answers.

        Raises:
            UnavailableError: a part of the model cannot be reached.
        """
        ...


class RefusedError(Exception):
    """A request is refused with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class LimitedRequest(Request):
    """A request that is refused with status 413 as soon as its body is known to exceed `max_bytes`."""

    max_bytes = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the body. Raise RefusedError if the body is too large."""
        limit = f"the body is larger than {self.max_bytes / 1e6:g} MB; send fewer or smaller images"
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise RefusedError(413, limit)
        received = 0
        async for chunk in super().stream():
            received += len(chunk)
            if received > self.max_bytes:
                raise RefusedError(413, limit)
            yield chunk


def build_app(model: ServedModel, pool: Executor, max_bytes: int, token_sha256: str | None) -> Starlette:
    """Return the ASGI application of a model.

    Args:
        pool: classifies on its threads. Their number limits how many requests can share batches.
        max_bytes: largest size of a request body.
        token_sha256: SHA-256, in hexadecimal, of the token that POST / and GET /model require; None requires no token.
    """
    named = {MODEL_HEADER: quote(model.address, safe=":/")}  # a header is Latin-1, but a name need not be

    async def page(_: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    async def health(_: Request) -> Response:
        return Response("ok", media_type="text/plain")

    async def about(request: Request) -> Response:
        check_token(request, token_sha256)
        return JSONResponse(model.about())

    async def classify(request: Request) -> Response:
        check_token(request, token_sha256)
        limited = LimitedRequest(request.scope, request.receive)
        limited.max_bytes = max_bytes
        name, wanted = wanted_policy(request)
        images, params, is_alone = await images_of(limited)
        try:
            policy = model.policy(name, wanted | given_params(params))
        except ValueError as error:
            raise RefusedError(400, str(error)) from None
        stop = threading.Event()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(pool, model.classify, images, policy, stop)
        except asyncio.CancelledError:  # the request timed out, or its connection ended
            stop.set()
            raise
        rows = [{column: getattr(answer, column) for column in OUTPUT_COLUMNS} for answer in answers]
        if is_alone and rows[0]["error"] is not None:
            raise RefusedError(400, rows[0]["error"])
        return JSONResponse({"predictions": rows, "model": model.address})

    def answered(handler: Handler) -> Handler:
        """Wrap a handler so that every response names the model, and every error is JSON with a reason."""

        async def handle(request: Request) -> Response:
            headers = dict(named)
            try:
                response = await handler(request)
            except RefusedError as error:
                status, reason = error.status, str(error)
            except UnavailableError as error:
                status, reason = 503, f"{error}; try again"
                headers["retry-after"] = str(RETRY_SECONDS)
            except ClientDisconnect:
                status, reason = 400, "the connection closed before the whole body arrived"
            except Exception:
                log.exception("a request failed")
                status, reason = 500, "the server failed; its log says why"
            else:
                response.headers.update(headers)
                return response
            if status == 401:
                headers["www-authenticate"] = "Bearer"
            return JSONResponse({"error": reason, "model": model.address}, status, headers)

        return handle

    async def unknown(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = f"{error.detail}; the addresses are POST /, GET /, GET /model and GET /healthz"
        return JSONResponse({"error": reason, "model": model.address}, error.status_code, named)

    routes = [
        Route("/", answered(page), methods=["GET"]),
        Route("/", answered(classify), methods=["POST"]),
        Route("/invocations", answered(classify), methods=["POST"]),  # as MLflow's server names it
        Route("/model", answered(about), methods=["GET"]),
        Route("/healthz", answered(health), methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: unknown})


def digest_of(token: str) -> str:
    """Return the SHA-256 of a token in hexadecimal, which is safe to show in a configuration."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_token(request: Request, token_sha256: str | None) -> None:
    """Raise RefusedError with status 401 if a token is required and the request does not have it."""
    if token_sha256 is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(digest_of(given.strip()), token_sha256):
        raise RefusedError(401, "this server needs its token: send the header Authorization: Bearer TOKEN")


def wanted_policy(request: Request) -> tuple[str | None, dict[str, float]]:
    """Return the policy name of a request, or None, and its parameters for `policy_for`, from query and headers.

    Raises:
        RefusedError: a parameter is unknown or not a number.
    """
    known = (*POLICY_PARAMS, POLICY)
    given = {name: text for name in known if (text := request.headers.get(f"x-{name.replace('_', '-')}"))}
    for name, text in request.query_params.multi_items():
        if name not in known:
            raise RefusedError(400, f"the parameter {name!r} is unknown; give one of {', '.join(known)}")
        given[name] = text
    policy = given.pop(POLICY, None)
    return policy, {POLICY_PARAMS[name]: _number(name, text) for name, text in given.items()}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RefusedError(400, f"{name} is {text!r}; give a number") from None


async def images_of(request: Request) -> tuple[list[Any], dict[str, Any], bool]:
    """Return a request's images, the parameters in its body, and whether the body is a single image file.

    Raises:
        RefusedError: with status 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=10_000) as form:
                texts = [name for name, value in form.multi_items() if isinstance(value, str)]
                if texts:
                    raise RefusedError(400, f"the form's field {texts[0]!r} is text; send every image as a file")
                return [await value.read() for _, value in form.multi_items() if not isinstance(value, str)], {}, False
        except (MultiPartException, HTTPException) as error:
            reason = error.detail if isinstance(error, HTTPException) else error.message
            raise RefusedError(400, f"the form cannot be read: {reason}") from None
    body = await request.body()
    if kind == "application/json":
        return *parse_json(body), False
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise RefusedError(
            415, f"the content type is {kind}; send image/jpeg, image/png, multipart/form-data or application/json"
        )
    return [body], {}, True


def parse_json(body: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Return the images and parameters of MLflow's JSON. A record without an image gives None.

    Raises:
        RefusedError: with status 400.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from None
    forms = [name for name in FORMS if isinstance(content, dict) and name in content]
    if len(forms) != 1:
        raise RefusedError(400, f"the body has {' and '.join(forms) or 'no images'}; give one of {', '.join(FORMS)}")
    value, params = content[forms[0]], content.get("params")
    if params is not None and not isinstance(params, dict):
        raise RefusedError(400, f"params is {type(params).__name__}; give an object")
    if unknown := [name for name in params or {} if name not in PARAMS]:
        raise RefusedError(400, f"the parameter {unknown[0]!r} is unknown; give one of {', '.join(PARAMS)}")
    return _cells(forms[0], value), params or {}


def _cells(form: str, value: Any) -> list[Any]:
    if form == "dataframe_split":
        columns, rows = (value.get("columns"), value.get("data")) if isinstance(value, dict) else (None, None)
        if not isinstance(columns, list) or not isinstance(rows, list) or IMAGE_COLUMN not in columns:
            raise RefusedError(400, f'dataframe_split needs "columns" with {IMAGE_COLUMN!r} and rows as "data"')
        place = columns.index(IMAGE_COLUMN)
        return [row[place] if isinstance(row, list) and place < len(row) else None for row in value["data"]]
    if isinstance(value, dict) and form == "inputs":
        value = value.get(IMAGE_COLUMN)
    if not isinstance(value, list):
        raise RefusedError(400, f"{form} is {type(value).__name__}; give a list of images as base64 text")
    if form == "dataframe_records" and not all(isinstance(cell, dict) for cell in value):
        raise RefusedError(400, f'dataframe_records needs records like {{"{IMAGE_COLUMN}": "base64 text"}}')
    return [cell.get(IMAGE_COLUMN) if isinstance(cell, dict) else cell for cell in value]
