"""The FastAPI application: routes, error handlers, middleware. No state of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from ..common.errors import SixfoldError
from .errors import ApiError, ClientGone, on_client_gone, on_error, on_http_error
from .middleware import Around
from .routes import chat, completions, status, tokens
from .service import Service

ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("GET", "/v1/models", status.models),
    ("GET", "/v1/models/{model_id:path}", status.model),
    ("GET", "/v1/platform", status.platform),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/health", status.health),
    ("GET", "/ready", status.ready),
    ("GET", "/metrics", status.metrics),
    ("GET", "/", status.page),
)


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Sixfold",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ApiError: on_error,
            SixfoldError: on_error,
            ClientGone: on_client_gone,
            HTTPException: on_http_error,
        },
    )
    app.state.service = service
    for method, path, handler in ROUTES:
        # Handlers take the bare request: bodies are read and checked by `reading`, so that every
        # error has one shape.
        app.add_route(path, handler, methods=[method])
    app.add_middleware(Around, service=service, router=app.router)
    return app
