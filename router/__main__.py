"""`python -m router`: one router."""

from __future__ import annotations

from common.config import RouterConfig
from common.service import main, serve
from router.router import Router, load_tokenizer

SERVICES = ("pdserve.v1.RouterService",)


async def run(config: RouterConfig) -> None:
    """Serves until told to stop."""
    router = Router(config, await load_tokenizer(config.model))
    async with router.running():
        await serve(config, router.add_to, SERVICES, health=router.health, metrics=router.metrics, drain=router.drain)


if __name__ == "__main__":
    main(RouterConfig, run)
