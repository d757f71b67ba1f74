"""A service of Lineup from Python: every call of the HTTP interface as a method, with the types of its answers.

with Client("https://lineup.example", token) as lineup:
[verdict] = lineup.detect(Path("photo.jpg"))
print(verdict.verdict, verdict.score, [near.generator for near in verdict.neighbours])
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote
from uuid import UUID

import httpx2
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from api.schemas import Label
from api.schemas.problems import FailedFile, Problem
from api.schemas.resources import (
    Added,
    CalibrationState,
    CandidateEnrolment,
    Candidates,
    Corrected,
    Detection,
    DetectionPage,
    DetectionSummary,
    Enrolment,
    Enrolments,
    Feedback,
    Generator,
    GeneratorChange,
    Generators,
    Job,
    JobResults,
    Jobs,
    NewGenerator,
    ReferenceChange,
    ReferenceImage,
    ReferenceMap,
    ReferenceNeighbours,
    ReferencePage,
    Removed,
    Replay,
    Status,
)
from api.schemas.verdicts import Detections, Explanation, Hits, Neighbour, Searches, Verdict

Answer = TypeVar("Answer", bound=BaseModel)
Image = Path | bytes | tuple[str, bytes]
"""A file, the bytes of one, or a name and the bytes."""
SECONDS = 120.0
"""Longest silence of the service; it gives an answer within LINEUP_REQUEST_SECONDS itself."""
LATER = (429, 503)
"""Statuses of a service that may answer in a moment."""
MOST_WAIT = 30.0
"""Seconds between two attempts, whatever the service asks for."""
PAGE = 100


class ServiceError(Exception):
    """The service refused a call.

    Attributes:
        status: Of HTTP.
        problem: What the service says (RFC 9457); None where something between answered, such as a proxy.
        retry_after: Seconds after which the service asks to be called again, 0 where it names none.
    """

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.problem: Problem | None = None
        with suppress(ValidationError):
            self.problem = Problem.model_validate_json(response.content, extra="ignore")
        asked = response.headers.get("retry-after", "")
        self.retry_after = float(asked) if asked.isdecimal() else 0.0
        super().__init__(response)  # which pickle makes it of again, in another process

    def __str__(self) -> str:
        [response] = self.args
        return self.problem.detail if self.problem else f"HTTP {self.status}: {response.text[:200]}"


class Client:
    """Calls a service; threads may share it.

    Args:
        url: Where `lineup serve` listens, such as http://127.0.0.1:8000.
        token: An API key, or the token that `lineup serve` prints; None where the service is open.
        attempts: How often a call is made, where the service answers 429 or 503, before its refusal is raised.
        http: A client of httpx2 to use in place of one of its own, for proxies, certificates and time limits.

    Raises:
        ServiceError: By every method, where the service refuses.
        httpx2.HTTPError: By every method, where it cannot be reached.
    """

    def __init__(
        self, url: str, token: str | None = None, *, attempts: int = 3, http: httpx2.Client | None = None
    ) -> None:
        self.http = http or httpx2.Client(timeout=SECONDS)
        self.url = url.rstrip("/")
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self._retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, ServiceError) and error.status in LATER),
            stop=stop_after_attempt(attempts),
            wait=_wait,
            reraise=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self.http.close()

    def detect(
        self,
        *images: Image,
        k: int | None = None,
        max_false_alarm: float | None = None,
        explain: Sequence[Explanation] = (),
        record: bool = True,
    ) -> list[Verdict | FailedFile]:
        """Judge images: a verdict on each, in their order, or why there is none.

        A single image that cannot be judged is refused.
        """
        query = _asked(k, max_false_alarm, explain, record)
        return self._call("POST", "/detect", Detections, params=query, files=_files("image", images)).results

    def search(
        self,
        *images: Image,
        label: Label | None = None,
        generator: str | None = None,
        source: str | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> list[Hits | FailedFile]:
        """Find the references nearest to each image."""
        query = {"label": label, "generator": generator, "source": source, "limit": limit, "offset": offset}
        return self._call("POST", "/search", Searches, params=query, files=_files("image", images)).results

    def add(self, *images: Image, label: Label, generator: str | None = None, source: str = "upload") -> Added:
        """Add images to the references; those that are there change nothing."""
        fields = {"label": label, "generator": generator, "source": source}
        fields = {name: value for name, value in fields.items() if value is not None}
        return self._call("POST", "/references", Added, data=fields, files=_files("images", images))

    def references(
        self,
        *,
        label: Label | None = None,
        generator: str | None = None,
        source: str | None = None,
        newest: bool = False,
        sort: Literal["label", "generator", "source"] | None = None,
    ) -> Iterator[ReferenceImage]:
        """Every reference of a kind, in the order they were added, or the newest first; `sort` groups them before."""
        query: dict[str, object] = {"label": label, "generator": generator, "source": source, "sort": sort}
        query["newest"] = "true" if newest else None
        for page in self._pages("/references", ReferencePage, query):
            yield from page.references

    def map(self) -> ReferenceMap:
        """The references on a plane."""
        return self._call("GET", "/map", ReferenceMap)

    def neighbours(
        self,
        id: int,
        *,
        label: Label | None = None,
        generator: str | None = None,
        source: str | None = None,
        limit: int = 10,
    ) -> list[Neighbour]:
        """The references nearest to one of them."""
        query = {"label": label, "generator": generator, "source": source, "limit": limit}
        return self._call("GET", _path("references", id, "neighbours"), ReferenceNeighbours, params=query).neighbours

    def reference(self, id: int) -> ReferenceImage:
        """One reference."""
        return self._call("GET", _path("references", id), ReferenceImage)

    def thumbnail(self, id: int) -> bytes:
        """The small JPEG of a reference."""
        return self._send("GET", _path("references", id, "thumbnail")).content

    def relabel(self, id: int, label: Label, generator: str | None = None) -> ReferenceImage:
        """Change what a reference is; from then on it has the id of the answer."""
        change = ReferenceChange(label=label, generator=generator)
        return self._call("PATCH", _path("references", id), ReferenceImage, json=_json(change))

    def remove(self, id: int) -> Removed:
        """Remove a reference."""
        return self._call("DELETE", _path("references", id), Removed)

    def generators(self) -> list[Generator]:
        """Every generator with its references."""
        return self._call("GET", "/generators", Generators).generators

    def generator(self, name: str) -> Generator:
        """One generator, whatever the case of its name."""
        return self._call("GET", _path("generators", name), Generator)

    def create_generator(self, name: str, **facts: Any) -> Generator:
        """Make a generator known; `facts` are the fields of `NewGenerator`."""
        return self._call("POST", "/generators", Generator, json=_json(NewGenerator(name=name, **facts)))

    def change_generator(self, name: str, **changes: Any) -> Generator:
        """Change facts of a generator, or its name (`name_`); `changes` are the fields of `GeneratorChange`."""
        changed = GeneratorChange(**{key.rstrip("_"): value for key, value in changes.items()})
        return self._call("PATCH", _path("generators", name), Generator, json=_json(changed))

    def delete_generator(self, name: str) -> Removed:
        """Remove a generator and all its references."""
        return self._call("DELETE", _path("generators", name), Removed)

    def enrolments(self) -> Iterator[Enrolment]:
        """What was added when, newest first."""
        for page in self._pages("/enrolments", Enrolments, {}):
            yield from page.enrolments

    def enrolment(self, id: int) -> Enrolment:
        """One enrolment and its report."""
        return self._call("GET", _path("enrolments", id), Enrolment)

    def undo(self, enrolment: int) -> Removed:
        """Remove the references that an enrolment added."""
        return self._call("DELETE", _path("enrolments", enrolment), Removed)

    def candidates(self) -> Candidates:
        """Groups of judged images that may be a new generator's."""
        return self._call("GET", "/candidates", Candidates)

    def enrol_candidate(self, name: str, generator: str, source: str = "verdicts") -> Added:
        """Make references of a candidate's images; `undo` takes them away again."""
        wanted = CandidateEnrolment(generator=generator, source=source)
        return self._call("POST", _path("candidates", name, "enrol"), Added, json=_json(wanted))

    def detections(self) -> Iterator[DetectionSummary]:
        """Every verdict that was kept, newest first."""
        for page in self._pages("/detections", DetectionPage, {}):
            yield from page.detections

    def detection(self, id: str) -> Detection:
        """One verdict that was kept."""
        return self._call("GET", _path("detections", id), Detection)

    def overlay(self, id: str) -> bytes:
        """The regions of a verdict as a transparent PNG."""
        return self._send("GET", _path("detections", id, "overlay")).content

    def judged_thumbnail(self, id: str) -> bytes:
        """The image that was judged as a small JPEG, where the service keeps them."""
        return self._send("GET", _path("detections", id, "thumbnail")).content

    def replay(self, id: str) -> Replay:
        """Judge the embedding that was kept once more, against the references of now."""
        return self._call("POST", _path("detections", id, "replay"), Replay)

    def feedback(self, id: str, label: Label, note: str = "") -> Detection:
        """Dispute or confirm a verdict."""
        said = Feedback(label=label, note=note)
        return self._call("POST", _path("detections", id, "feedback"), Detection, json=_json(said))

    def enrol_detection(
        self, id: str, label: Label, generator: str | None = None, source: str = "verdicts", image: Image | None = None
    ) -> Corrected:
        """Make a reference of an image that was judged, or relabel the one that it is.

        `image` is the image itself, without which another checkpoint cannot embed it again.
        """
        fields = {"label": label, "generator": generator, "source": source}
        fields = {name: value for name, value in fields.items() if value is not None}
        files = _files("image", [] if image is None else [image])
        return self._call("POST", _path("detections", id, "enrol"), Corrected, data=fields, files=files)

    def start_job(
        self,
        *images: Image,
        urls: Sequence[str] = (),
        webhook: str | None = None,
        k: int | None = None,
        max_false_alarm: float | None = None,
        explain: Sequence[Explanation] = (),
        record: bool = True,
        idempotency_key: str | None = None,
    ) -> Job:
        """Have images, and those at https:// addresses, judged in the background; `webhook` is told of the end.

        A service that was too busy to answer may have taken it all the same. With an `idempotency_key`, which is to be
        another one for each job, it is sent again, and makes no second job; without one it is sent once.
        """
        files = _files("image", images)
        if urls:
            files.append(("urls", ("urls.txt", "\n".join(urls).encode())))
        data = {"webhook": webhook} if webhook else {}
        query = _asked(k, max_false_alarm, explain, record)
        headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
        once = idempotency_key is None
        return self._call("POST", "/jobs", Job, once=once, headers=headers, params=query, data=data, files=files)

    def jobs(self) -> Iterator[Job]:
        """Every job that this key may see, newest first."""
        for page in self._pages("/jobs", Jobs, {}):
            yield from page.jobs

    def job(self, id: UUID) -> Job:
        """One job; it has ended where `ended_at` is set."""
        return self._call("GET", _path("jobs", id), Job)

    def job_results(self, id: UUID) -> Iterator[Verdict | FailedFile]:
        """What is said of a job's images, in their order; of one that runs, of those judged so far."""
        for page in self._pages(_path("jobs", id, "results"), JobResults, {}):
            for result in page.results:
                model = FailedFile if "error" in result else Verdict
                yield model.model_validate(result, extra="ignore")
            if not page.results:
                return

    def job_table(self, id: UUID) -> bytes:
        """The same as CSV."""
        return self._send("GET", _path("jobs", id, "results.csv")).content

    def cancel_job(self, id: UUID) -> Job:
        """End a job; its results stay."""
        return self._call("POST", _path("jobs", id, "cancel"), Job)

    def delete_job(self, id: UUID) -> None:
        """Forget a job with its results."""
        self._send("DELETE", _path("jobs", id))

    def status(self) -> Status:
        """What is loaded, followed and calibrated."""
        return self._call("GET", "/status", Status)

    def calibration(self) -> CalibrationState:
        """The calibration in use and what it promises."""
        return self._call("GET", "/calibration", CalibrationState)

    def _pages(self, path: str, model: type[Answer], query: dict[str, Any]) -> Iterator[Answer]:
        after: object = None
        while True:
            page: Any = self._call("GET", path, model, params=query | {"limit": PAGE, "after": after})
            yield page
            if (after := page.next) is None:
                return

    def _call(self, method: str, path: str, model: type[Answer], **content: Any) -> Answer:
        # A newer service may say more.
        return model.model_validate_json(self._send(method, path, **content).content, extra="ignore")

    def _send(self, method: str, path: str, *, once: bool = False, **content: Any) -> httpx2.Response:
        if query := content.get("params"):
            content["params"] = {name: value for name, value in query.items() if value is not None}

        headers = self.headers | content.pop("headers", {})

        def send() -> httpx2.Response:
            response = self.http.request(method, f"{self.url}/v1{path}", headers=headers, **content)
            if not response.is_success:
                raise ServiceError(response)
            return response

        return send() if once else self._retrying(send)


def _wait(state: RetryCallState) -> float:
    """Seconds as the service asks, else 1, 2, 4 ..."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ServiceError) else 0.0
    return min(MOST_WAIT, asked or 2.0 ** (state.attempt_number - 1))


def _asked(
    k: int | None, max_false_alarm: float | None, explain: Sequence[Explanation], record: bool
) -> dict[str, Any]:
    asked = {"k": k, "max_false_alarm": max_false_alarm, "explain": ",".join(explain) or None}
    return asked | {"record": None if record else "false"}


def _path(*parts: object) -> str:
    """A path of these parts, none of which can lead elsewhere: a generator may be called SD#2, and is no ../jobs."""
    return "".join(f"/{quote(str(part), safe='')}" for part in parts)


def _json(model: BaseModel) -> Any:
    return model.model_dump(mode="json", exclude_unset=True)


def _files(field: str, images: Sequence[Image]) -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, _named(image, number)) for number, image in enumerate(images)]


def _named(image: Image, number: int) -> tuple[str, bytes]:
    if isinstance(image, Path):
        return image.name, image.read_bytes()
    return (f"image-{number}", image) if isinstance(image, bytes) else image
