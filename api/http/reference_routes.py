"""Calls about reference images."""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any
from uuid import UUID

from fastapi import File, Form, Query, Response, UploadFile

from api import verdict_log
from api.access import Caller, hide_paths
from api.enrolment import Batch, correct, enrol, relabel, remove
from api.http.dependencies import Enrolling, Id, Jpeg, Limit, Loaded, Reading, Served, existing, read_uploads, v1_router
from api.judge.detector import Detector
from api.judge.evidence import SearchQuery, thumbnail_path
from api.schemas import LABELS, GeneratorName, Label, Text
from api.schemas.problems import ApiError, documented
from api.schemas.resources import (
    Added,
    Corrected,
    ReferenceChange,
    ReferenceImage,
    ReferenceMap,
    ReferenceNeighbours,
    ReferencePage,
    Removed,
)
from api.service_settings import ServiceSettings
from indexer.measure.discovery import SOURCE
from indexer.store.reference_facts import Reference
from indexer.store.references import SortKey

router = v1_router("references")


def reference_image(row: Reference, caller: Caller, settings: ServiceSettings) -> ReferenceImage:
    """One reference image, as this caller may see it."""
    fields = asdict(row) | {
        "label": LABELS[row.label],
        "uri": caller.visible(row.uri or None),
        "thumbnail": thumbnail_path(row, settings.thumbnail_places),
        "enrolment": row.enrolment_id,
    }
    return ReferenceImage.model_validate(fields, extra="ignore")


@router.post("/references", responses=documented("unreadable", "not-an-image", "conflict"))
async def add_references(
    service: Served,
    caller: Enrolling,
    images: Annotated[
        list[UploadFile], File(min_length=1, description="Reference images, all of one label and generator.")
    ],
    label: Annotated[Label, Form()],
    generator: Annotated[Text | None, Form(description="What made them, for fakes only.")] = None,
    source: Annotated[Text, Form(description="Where they came from.")] = "upload",
) -> Added:
    """Add images to the reference set. The same bytes twice change nothing."""
    batch = Batch(label, generator, source)
    uploads = await read_uploads(images, service.settings)
    return await service.enrol(partial(enrol, uploads=uploads, batch=batch), len(uploads))


@router.post("/detections/{id}/enrol", responses=documented("not-found", "unreadable", "not-an-image", "conflict"))
async def enrol_detection(
    service: Served,
    caller: Enrolling,
    id: UUID,
    label: Annotated[Label, Form()],
    generator: Annotated[GeneratorName | None, Form(description="What made it, for fakes only.")] = None,
    source: Annotated[Text, Form(description="Where it came from.")] = SOURCE,
    image: Annotated[UploadFile | None, File(description="The image itself, which verdicts do not keep.")] = None,
) -> Corrected:
    """Make a reference of an image that was judged, or relabel the reference that it is.

    Without `image` the reference has the embedding of the verdict, and a picture only where the verdict has one.
    """
    batch = Batch(label, generator, source)
    upload = next(iter(await read_uploads([image] if image else [], service.settings)), None)

    def work(detector: Detector) -> Corrected:
        verdict = verdict_log.find(detector, caller, id)
        added, reference, former = correct(detector, verdict, batch, upload)
        return Corrected(
            **added.model_dump(),
            reference=reference_image(reference, caller, service.settings),
            relabelled=former is not None,
            former=None if former is None else ReferenceChange(label=LABELS[former.label], generator=former.generator),
            readable=detector.store.references.readable(reference.id),
        )

    return await service.enrol(work, 1)


@router.get("/references", responses=documented("not-found"))
async def list_references(
    service: Served,
    detector: Loaded,
    caller: Reading,
    label: Label | None = None,
    generator: Text | None = None,
    source: Text | None = None,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next` of the page before.")] = 0,
    newest: Annotated[bool, Query(description="The newest first.")] = False,
    sort: Annotated[SortKey | None, Query(description="What belongs together, before the order of addition.")] = None,
    limit: Limit = 100,
) -> ReferencePage:
    """Reference images in the order they were added."""
    references, number = detector.store.references, None if label is None else LABELS.index(label)
    narrowed: dict[str, Any] = {"label": number, "generator": generator, "source": source}
    narrowed |= {"newest": newest, "limit": limit}
    if sort is None:
        read = partial(references.list, after=after, **narrowed)
    else:
        last = None
        if after:
            last = existing(await service.run(references.get, after), f"reference {after} to go on after")
        read = partial(references.sorted, sort, after=last, **narrowed)
    page = [reference_image(row, caller, service.settings) for row in await service.run(read)]
    return ReferencePage(references=page, next=page[-1].id if len(page) == limit else None)


@router.get("/map", responses=documented("not-ready"))
async def get_map(service: Served, detector: Loaded, caller: Reading) -> ReferenceMap:
    """The references on a plane, drawn in the background after each change of the index."""
    drawn = service.reference_map
    if drawn is None or drawn.checkpoint_id != detector.embedder.id:
        raise ApiError("not-ready", "the map of the references is being drawn", retry_after=2)
    follower, projection = detector.follower, drawn.projection

    def work() -> ReferenceMap:
        return ReferenceMap(
            checkpoint=drawn.checkpoint_id,
            revision=drawn.revision,
            references=sum(follower.index.counts()),  # which waits for an index that is being changed
            explained=list(projection.explained) if projection else [0.0, 0.0],
            **drawn.summary(follower.generator_names),
        )

    return await service.run(work)


@router.get("/references/{id}", responses=documented("not-found"))
async def get_reference(service: Served, detector: Loaded, caller: Reading, id: Id) -> ReferenceImage:
    """One reference image."""
    row = existing(await service.run(detector.store.references.get, id), f"reference {id}")
    return reference_image(row, caller, service.settings)


@router.get("/references/{id}/thumbnail", responses=documented("not-found"), response_class=Jpeg)
async def get_thumbnail(service: Served, detector: Loaded, caller: Reading, id: Id) -> Response:
    """A reference image, its longest side at most 256 pixels."""
    data = await service.thumbnail(id)
    if data is None:
        existing(await service.run(detector.store.references.get, id), f"reference {id}")
        raise ApiError(
            "not-found", f"reference {id} has no picture here: `lineup index thumbnails` fetches public ones"
        )
    return Jpeg(data, headers={"cache-control": "private, max-age=86400"})


@router.get("/references/{id}/neighbours", responses=documented("not-found", "conflict"))
async def get_neighbours(
    service: Served,
    detector: Loaded,
    caller: Reading,
    id: Id,
    label: Label | None = None,
    generator: Text | None = None,
    source: Text | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> ReferenceNeighbours:
    """The reference images nearest to one of them."""
    query = SearchQuery(label=label, generator=generator, source=source, limit=limit)
    neighbours = await service.run(detector.neighbourhood.around, id, query)
    if neighbours is None:
        existing(await service.run(detector.store.references.get, id), f"reference {id}")
        raise ApiError("conflict", f"reference {id} has no vector of the checkpoint that serves")
    hide_paths(neighbours, caller)
    return ReferenceNeighbours(neighbours=neighbours)


@router.patch("/references/{id}", responses=documented("not-found"))
async def relabel_reference(
    service: Served, detector: Loaded, caller: Enrolling, id: Id, change: ReferenceChange
) -> ReferenceImage:
    """Change label and generator of a reference image. From then on it has the id of the answer.

    Its attributes tell `former_label` and `former_generator`; to relabel it to these undoes it.
    """
    row = existing(await service.run(relabel, detector, id, change), f"reference {id}")
    return reference_image(row, caller, service.settings)


@router.delete("/references/{id}", responses=documented("not-found"))
async def delete_reference(service: Served, detector: Loaded, caller: Enrolling, id: Id) -> Removed:
    """Remove one reference image; it votes no more."""
    removed = await service.run(remove, detector, partial(detector.store.references.remove, ids=[id]))
    if not removed.references:
        raise ApiError("not-found", f"there is no reference {id}")
    return removed
