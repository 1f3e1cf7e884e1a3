"""`python -m router`: one router."""

from __future__ import annotations

from common.config import RouterConfig
from common.service import main, serve
from common.tracing import tracing
from router.router import Router, load_tokenizer

SERVICES = ("pdserve.v1.RouterService",)


async def run(config: RouterConfig) -> None:
    """Serves until told to stop."""
    with tracing(config) as tracer:
        router = Router(config, await load_tokenizer(config.model), tracer=tracer)
        async with router.running():
            await serve(
                config, router.add_to, SERVICES, health=router.health, metrics=router.metrics, drain=router.drain
            )


if __name__ == "__main__":
    main(RouterConfig, run)
