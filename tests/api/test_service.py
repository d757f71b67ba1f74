"""A service ends without finishing what can wait for the next one."""

import asyncio
from types import SimpleNamespace
from typing import Any

from api.monitoring import Metrics
from api.service import Service
from api.service_settings import ServiceSettings
from indexer.store.blobs import DRAINED, Drained


def test_closing_ends_the_deletion_of_objects_between_two_parts() -> None:
    parts: list[Drained] = []

    def drain_some() -> Drained:
        parts.append(Drained(DRAINED if len(parts) < 500 else 0))
        return parts[-1]

    service: Any = Service(ServiceSettings(), Metrics())
    blobs = SimpleNamespace(drain_some=drain_some)
    detector = SimpleNamespace(store=SimpleNamespace(blobs=blobs))
    service._serving, service._ready = SimpleNamespace(detector=detector, stop=lambda: None), True

    async def close_meanwhile() -> None:
        draining = asyncio.create_task(service._drain_blobs())
        while len(parts) < 2:
            await asyncio.sleep(0)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        service.close()

    asyncio.run(close_meanwhile())
    assert 2 <= len(parts) < 500
