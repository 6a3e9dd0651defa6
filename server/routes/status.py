"""Models, health, readiness, metrics, the platform's report, and the chat page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ..responses import json_response
from ..service import Phase, Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(service: Service) -> dict[str, object]:
    loaded = service.loaded
    return {
        "id": service.model,
        "object": "model",
        "created": loaded.created,
        "owned_by": "sixfold",
        "max_model_len": loaded.ready.max_context,
    }


async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(_service(request))]})


async def model(request: Request) -> Response:
    service = _service(request)
    card = _model(service)
    service.check_model(request.path_params["model_id"])
    return json_response(card)


async def health(request: Request) -> Response:
    """Liveness: the process answers and its engine has not died."""
    service = _service(request)
    if service.phase is Phase.DEAD:
        service.loaded  # noqa: B018 (raises the 503)
    return json_response({"status": service.phase.value})


async def ready(request: Request) -> Response:
    """Readiness: 503 while loading, draining or dead."""
    _service(request).loaded  # noqa: B018 (raises the 503)
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def platform(request: Request) -> Response:
    """Every decision of start-up, the same records as `serve --explain`."""
    service = _service(request)
    report = service.loaded.ready
    return json_response(
        {
            "platform": report.platform,
            "model": service.model,
            "max_context": report.max_context,
            "vocab_size": report.vocab_size,
            "max_logprobs": report.max_logprobs,
            "page_size": report.page_size,
            "max_queue": report.max_queue,
            "weight_bytes": report.weight_bytes,
            "cache_bytes": report.cache_bytes,
            "groups": report.groups,
            "features": {
                name: {"status": status, "reason": reason}
                for name, (status, reason) in report.features.items()
            },
            "decisions": report.decisions,
        }
    )


@cache
def _page() -> bytes:
    return files("sixfold.server").joinpath("page.html").read_bytes()


async def page(request: Request) -> Response:
    return Response(_page(), media_type="text/html")
