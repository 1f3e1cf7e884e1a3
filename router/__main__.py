"""`python -m router`: one router."""

from __future__ import annotations

import contextlib

from common.config import ConfigError, RouterConfig
from common.service import main, serve
from common.tracing import tracing
from router.router import Router, load_tokenizer

SERVICES = ("pdserve.v1.RouterService",)


async def run(config: RouterConfig) -> None:
    """Serves until told to stop."""
    with tracing(config) as tracer:
        router = Router(config, await load_tokenizer(config.model), tracer=tracer)
        async with router.running(), _http(config, router):
            await serve(
                config, router.add_to, SERVICES, health=router.health, metrics=router.metrics, drain=router.drain
            )


def _http(config: RouterConfig, router: Router) -> contextlib.AbstractAsyncContextManager[object]:
    """The OpenAI API, where it is asked for. Raises ConfigError when it is not installed."""
    if not config.http_listen:
        return contextlib.nullcontext()
    try:
        from router.http.server import listening
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"http_listen={config.http_listen!r}: needs {error.name}, of the extra `http`: pip install 'pdserve[http]'"
        ) from None
    return listening(config, router)


if __name__ == "__main__":
    main(RouterConfig, run)
