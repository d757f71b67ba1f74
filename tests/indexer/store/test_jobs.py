"""Jobs are taken by one service at a time, counted once, and forgotten as a whole."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, select, text, update

from indexer.database.connection import connect
from indexer.database.tables import JobImageRow, JobRow
from indexer.settings import Settings
from indexer.store.jobs import Job, JobImage, Jobs, NewImage


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    engine = connect(settings)
    yield Jobs(engine)
    engine.dispose()


def uploads(count: int, size: int = 4) -> list[NewImage]:
    return [NewImage(f"{number}.png", size, lambda: b"\0" * size) for number in range(count)]


def claim(jobs: Jobs, limit: int = 100, **changed: Any) -> list[JobImage]:
    images = jobs.claim(**{"fetched": False, "limit": limit, "seconds": 60, **changed})
    return sorted(images, key=lambda image: (image.number, image.file))


def current(jobs: Jobs, job: Job) -> Job:
    now = jobs.get(job.id)
    assert now is not None
    return now


def counts(job: Job) -> tuple[str, int, int, int, int]:
    return (job.state, job.fake, job.real, job.uncertain, job.failed)


def kept(jobs: Jobs) -> int:
    return jobs.read_value(select(func.count()).where(JobImageRow.bytes.is_not(None))) or 0


def test_a_job_goes_from_queued_to_done_and_keeps_no_bytes(jobs: Jobs) -> None:
    job = jobs.add([*uploads(2), NewImage("https://a.example/b.png")], {"k": 3}, webhook="https://c.example")
    assert (counts(job), job.images, job.webhook_state) == (("queued", 0, 0, 0, 0), 3, "pending")
    waiting = jobs.waiting()
    assert (waiting.jobs, waiting.images, waiting.bytes, waiting.oldest) == (1, 3, 8, job.at)
    first, second = claim(jobs)
    assert (first.file, first.bytes, first.attempts, first.question) == ("0.png", b"\0" * 4, 1, {"k": 3})
    assert current(jobs, job).state == "running"
    assert jobs.finish(second, "fake", {"file": "1.png", "text": "\0 and \ud800"})
    assert jobs.results(job.id) == []  # those before it are to come
    assert jobs.finish(first, "failed", {"file": "0.png"})
    assert [number for number, _ in jobs.results(job.id)] == [1, 2]
    assert jobs.results(job.id, after=1, limit=1)[0][1]["text"] == "\0 and \ud800"
    assert (kept(jobs), jobs.waiting().bytes, jobs.claim_untold(limit=9, seconds=60)) == (0, 0, [])
    (third,) = claim(jobs, fetched=True)
    assert (third.file, third.bytes) == ("https://a.example/b.png", None)
    assert jobs.finish(third, "real", {})
    ended = current(jobs, job)
    assert counts(ended) == ("done", 1, 1, 0, 1)
    assert ended.ended_at is not None
    assert jobs.waiting().images == 0
    (untold,) = jobs.claim_untold(limit=9, seconds=60)
    assert (untold.id, jobs.claim_untold(limit=9, seconds=60)) == (job.id, [])
    jobs.release_untold([untold])
    assert jobs.claim_untold(limit=9, seconds=0) == [untold]
    jobs.told(job.id, "too slow")
    assert current(jobs, job).webhook_error == "too slow"
    assert jobs.claim_untold(limit=9, seconds=60) == []


def test_a_job_without_a_verdict_has_failed(jobs: Jobs) -> None:
    job = jobs.add(uploads(2), {})
    for image in claim(jobs):
        jobs.finish(image, "failed", {})
    assert counts(current(jobs, job)) == ("failed", 0, 0, 0, 2)


def test_what_is_taken_comes_back_when_its_time_is_over_or_it_is_given_back(jobs: Jobs) -> None:
    job = jobs.add(uploads(3), {})
    taken = claim(jobs, 2)
    assert [image.number for image in claim(jobs)] == [3]
    jobs.release(taken)
    assert [(image.number, image.attempts) for image in claim(jobs, seconds=-1)] == [(1, 1), (2, 1)]
    again = claim(jobs)
    assert [(image.number, image.attempts) for image in again] == [(1, 2), (2, 2)]
    assert jobs.finish(again[0], "real", {"by": "the second"})
    assert not jobs.finish(taken[0], "fake", {"by": "the first"})
    assert jobs.results(job.id) == [(1, {"by": "the second"})]
    assert counts(current(jobs, job)) == ("running", 0, 1, 0, 0)
    jobs.release(taken)  # what is judged stays judged
    assert jobs.results(job.id) == [(1, {"by": "the second"})]


def test_what_another_has_taken_since_is_not_given_back_and_attempts_may_count(jobs: Jobs) -> None:
    jobs.add(uploads(1), {})
    late = claim(jobs, seconds=-1)
    (lease,) = claim(jobs)
    jobs.release(late)
    assert claim(jobs) == []
    jobs.release([lease], counted=True)
    assert [image.attempts for image in claim(jobs)] == [3]


def test_services_that_take_at_once_share_without_doing_one_twice(jobs: Jobs) -> None:
    added = [jobs.add(uploads(count), {}) for count in (1, 7, 40)]

    def work(_: int) -> list[tuple[Any, int]]:
        done = []
        while images := claim(jobs, 2):
            done += [(image.job_id, image.number) for image in images if jobs.finish(image, "real", {})]
        return done

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(work, range(4)))
    judged = [place for share in shares for place in share]
    assert sorted(judged) == sorted((job.id, number) for job in added for number in range(1, job.images + 1))
    assert [current(jobs, job).real for job in added] == [1, 7, 40]
    assert {current(jobs, job).state for job in added} == {"done"}


def test_jobs_take_turns_so_that_none_waits_for_a_large_one_nor_for_a_stream_of_small_ones(jobs: Jobs) -> None:
    large = jobs.add(uploads(20), {})
    assert [image.number for image in claim(jobs, 3)] == [1, 2, 3]
    small = jobs.add(uploads(3), {})
    assert [(image.job_id, image.number) for image in claim(jobs, 3)] == [(small.id, 1), (large.id, 4), (large.id, 5)]
    turns = []
    for _ in range(12):  # a job of one image comes with each image that is taken
        jobs.add(uploads(1), {})
        turns += [image.job_id for image in claim(jobs, 1)]
    assert turns.count(large.id) >= 3
    assert turns.count(small.id) == 2
    assert len(set(turns)) > 6


def test_jobs_that_have_nothing_of_a_kind_take_no_turn_of_it(jobs: Jobs) -> None:
    for _ in range(3):
        jobs.add([NewImage("https://a.example/b.png")], {})
    job = jobs.add(uploads(1), {})
    assert [image.job_id for image in claim(jobs, 1)] == [job.id]


def test_a_key_of_idempotence_makes_one_job_for_each_who_asks(jobs: Jobs) -> None:
    with jobs.engine.begin() as connection:
        connection.execute(text("insert into api_key (name, hash, scopes) values ('a', 'a', '{detect}')"))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: jobs.add(uploads(2), {}, idempotency_key="one"), range(4)))
    assert len({job.id for job in made}) == 1
    others = {
        jobs.add(uploads(1), {}, idempotency_key=key, api_key_id=by).id for key, by in (("two", None), ("one", 1))
    }
    assert len(others - {made[0].id}) == 2
    assert jobs.waiting().images == 4
    assert jobs.made_with("one", 1) is not None
    assert jobs.made_with("three", 1) is None


def test_a_first_job_that_is_deleted_meanwhile_is_made_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jobs.add(uploads(1), {}, idempotency_key="one")
    made_with = jobs.made_with

    def too_late(idempotency_key: str | None, api_key_id: int | None) -> Job | None:
        jobs.delete(first.id)
        return made_with(idempotency_key, api_key_id)

    monkeypatch.setattr(jobs, "made_with", too_late)
    second = jobs.add(uploads(1), {}, idempotency_key="one")
    assert (second.id != first.id, jobs.get(first.id), jobs.waiting().jobs) == (True, None, 1)


def test_the_job_of_a_key_of_idempotence_is_found_by_the_index(jobs: Jobs) -> None:
    queries: list[tuple[str, Any]] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
        queries.append((statement, parameters))

    event.listen(jobs.engine, "before_cursor_execute", note)
    jobs.made_with("one", None)
    event.remove(jobs.engine, "before_cursor_execute", note)
    [(statement, parameters)] = [query for query in queries if "idempotency_key" in query[0]]
    with jobs.engine.begin() as connection:
        connection.execute(text("set local enable_seqscan = off"))
        plan = connection.exec_driver_sql(f"explain {statement}", parameters).scalars().all()
    [condition] = [line for line in plan if "Index Cond" in line]
    assert "COALESCE(api_key_id" in condition


def test_cancelling_drops_what_is_not_judged_and_a_late_result_changes_nothing(jobs: Jobs) -> None:
    job = jobs.add(uploads(4), {}, webhook="https://c.example")
    first, second = claim(jobs, 2)
    jobs.finish(first, "fake", {"file": "0.png"})
    jobs.cancel(job.id)
    assert not jobs.finish(second, "fake", {})
    assert (claim(jobs), kept(jobs), jobs.waiting().images) == ([], 0, 0)
    cancelled = current(jobs, job)
    assert counts(cancelled) == ("cancelled", 1, 0, 0, 0)
    assert jobs.results(job.id) == [(1, {"file": "0.png"})]
    jobs.cancel(job.id)
    assert current(jobs, job) == cancelled
    assert [untold.id for untold in jobs.claim_untold(limit=9, seconds=60)] == [job.id]


def test_a_deleted_job_leaves_nothing_and_old_ones_are_deleted(jobs: Jobs) -> None:
    running, ended = jobs.add(uploads(2), {}), jobs.add(uploads(1), {})
    taken = claim(jobs)
    for image in taken:
        if image.job_id == ended.id:
            jobs.finish(image, "real", {})
    assert (jobs.delete(running.id), jobs.delete(running.id)) == (True, False)
    assert not any(jobs.finish(image, "real", {}) for image in taken)
    before = datetime.now(UTC)
    assert jobs.delete_ended(before - timedelta(days=1)) == 0
    running = jobs.add(uploads(1), {})
    jobs.transaction(lambda connection: connection.execute(update(JobRow).values(at=before - timedelta(days=99))))
    assert jobs.delete_ended(before) == 1
    assert [job.id for job in jobs.list(everybody=True)] == [running.id]
    assert jobs.read_value(select(func.count()).select_from(JobImageRow)) == 1


def test_a_list_is_newest_first_and_of_one_key(jobs: Jobs) -> None:
    with jobs.engine.begin() as connection:
        connection.execute(text("insert into api_key (name, hash, scopes) values ('a', 'a', '{detect}')"))
    mine = [jobs.add(uploads(1), {}, api_key_id=1).id for _ in range(3)][::-1]
    other = jobs.add(uploads(1), {}).id
    assert [job.id for job in jobs.list(everybody=True)] == [other, *mine]
    assert [job.id for job in jobs.list(api_key_id=1)] == mine
    assert [job.id for job in jobs.list(api_key_id=1, before=mine[0], limit=1)] == mine[1:2]
    assert [job.id for job in jobs.list()] == [other]


def test_a_job_that_cannot_be_kept_whole_is_not_kept(jobs: Jobs) -> None:
    def broken() -> bytes:
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        jobs.add([*uploads(3), NewImage("3.png", 1, broken)], {})
    assert jobs.list(everybody=True) == []
