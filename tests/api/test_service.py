"""A service ends without finishing what can wait for the next one."""

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from api.monitoring import Metrics
from api.service import Service
from api.service_settings import ServiceSettings
from indexer.store.blobs import DRAINED, BlobsAway, Drained
from indexer.store.detections import MOVED


def test_thumbnails_are_moved_until_few_are_left_or_object_storage_is_away() -> None:
    service: Any = Service(ServiceSettings(), Metrics())
    move_thumbnails = Mock(side_effect=[MOVED, MOVED, 3, BlobsAway("refused")])
    detector = SimpleNamespace(store=SimpleNamespace(detections=SimpleNamespace(move_thumbnails=move_thumbnails)))
    service._serving, service._ready = SimpleNamespace(detector=detector, stop=lambda: None), True
    for calls in (3, 4):
        asyncio.run(service._move_thumbnails())
        assert move_thumbnails.call_count == calls
    service.close()


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
