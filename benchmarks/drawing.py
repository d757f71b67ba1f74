"""The map of the references: what it costs the service to draw and to send, and a browser to show.

References are random, in 50 clusters: nothing here depends on what they are. A browser's frame lasts from the event
that asks for it until the next one begins, so it includes what is painted of the points.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import psutil
import typer
from httpx2 import Client
from playwright.sync_api import sync_playwright

from api.service_settings import ServiceSettings
from benchmarks.serving import fill, random_checkpoint, resident, served
from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.measure.reference_map import draw_map
from indexer.store import Store

T = TypeVar("T")
FRAMES = 21
# The larger map, the whole one, and a lasso around all points, in turns.
SHOW = """async (frames) => {
    const canvas = document.querySelector("canvas"), { width, height, left, top } = canvas.getBoundingClientRect();
    const corners = [[1, 1], [1, height - 1], [width - 1, height - 1], [width - 1, 1]];
    const point = (type, [x, y]) => canvas.dispatchEvent(
        new PointerEvent(type, { pointerId: 1, clientX: left + x, clientY: top + y, bubbles: true }));
    canvas.setPointerCapture = () => {};
    const work = {
        zoom: () => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "+" })),
        whole: () => document.querySelector("[aria-label='Whole map']").click(),
        lasso: () => [point("pointerdown", corners[0]), ...corners.map((one) => point("pointermove", one)),
            point("pointerup", corners[0])],
    };
    const times = {};
    for (const [name, act] of Object.entries(work)) {
        times[name] = [];
        for (let frame = 0; frame < frames; frame += 1) {
            await new Promise(requestAnimationFrame);
            const start = performance.now();
            act();
            await new Promise(requestAnimationFrame);
            await new Promise((resolve) => { const { port1, port2 } = new MessageChannel();
                port1.onmessage = resolve; port2.postMessage(null); });
            times[name].push(performance.now() - start);
        }
        times[name].sort((one, other) => one - other);
    }
    return times;
}"""


def main(
    references: Annotated[int, typer.Option()] = 50_000,
    home: Annotated[Path | None, typer.Option(help="Of `benchmarks.serving`, or kept for another run.")] = None,
) -> None:
    """Print a Markdown table."""
    folder = home or Path(tempfile.mkdtemp(prefix="lineup-"))
    settings = ServiceSettings(home=folder, checkpoint=folder / "checkpoint", device="cpu")
    try:
        if not (folder / "checkpoint").exists():
            random_checkpoint(folder / "checkpoint")
            fill(settings, references)
        print("| | seconds | processor seconds | MiB more |\n|---|---:|---:|---:|")
        store = Store(connect(settings))
        active = store.checkpoints.active()
        if active is None:
            raise RuntimeError(f"the store in {folder} has no active checkpoint")
        drawn = measured("drawn for the first time", lambda: draw_map(store, active.id))
        measured("drawn anew, nothing new", lambda: draw_map(store, active.id, drawn))
        measured("told, as lists", lambda: drawn.summary({}))
        store.engine.dispose()
        with served(settings) as (port, pid, _):
            show(port, pid, len(drawn.ids))
    finally:
        EmbeddedServer(folder).stop()
        if home is None:
            shutil.rmtree(folder, ignore_errors=True)


def measured(name: str, work: Callable[[], T]) -> T:
    """What some work gives, after a line of its costs in this process."""
    process = psutil.Process()
    before, processor, start = process.memory_info().rss, time.process_time(), time.perf_counter()
    result = work()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(
        f"| {name} | {seconds:.2f} | {processor:.2f} | {(process.memory_info().rss - before) / 2**20:.0f} |", flush=True
    )
    return result


def show(port: int, pid: int, points: int) -> None:
    """Print what a service sends and a browser shows of so many points."""
    with Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as service:
        before = resident(pid)
        while service.get("/v1/map").status_code != 200:
            time.sleep(0.1)
        start = time.perf_counter()
        answer = service.get("/v1/map")
        seconds = time.perf_counter() - start
    print(f"\nGET /v1/map: {len(answer.content) / 2**20:.2f} MiB in {seconds:.2f} s")
    print(f"The service had {before} MiB before the map and {resident(pid)} after it.\n")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        start = time.perf_counter()
        page.goto(f"http://127.0.0.1:{port}/#/map")
        page.locator("#view-map .legend li").first.wait_for(timeout=120_000)
        print(f"Chromium shows {points:,} points {time.perf_counter() - start:.1f} s after the page was asked for.\n")
        print("| frame | median ms | longest ms |\n|---|---:|---:|")
        for name, times in page.evaluate(SHOW, FRAMES).items():
            print(f"| {name} | {times[len(times) // 2]:.0f} | {times[-1]:.0f} |")
        browser.close()


if __name__ == "__main__":
    typer.run(main)
