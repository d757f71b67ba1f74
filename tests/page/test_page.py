"""The page in a real browser: every journey, an error of each kind, hostile input, and accessibility."""

import csv
import io
import json
import re
import ssl
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import AXE, PATIENCE, Watch, chromium, huge, other_file, picture, served
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, ViewportSize, expect
from sqlalchemy import text

from api import job_worker
from api import verdict_printer as terminal
from api.access import hash_secret, new_secret
from api.schemas.verdicts import EXAMPLE_VERDICT, Verdict
from api.service_settings import ServiceSettings
from api.verdict_file import row, write_csv
from indexer.database.connection import connect
from indexer.ingest.public_files import public_client
from indexer.measure.discovery import SMALLEST
from indexer.store import Store
from indexer.store.detections import Detection

FILES = Path(__file__).parents[2] / "api" / "page"
DEPLOYMENT = FILES.parents[1] / "docs" / "deploy.md"
VIEWS = ("detect", "search", "references", "generators", "candidates", "status")
HOSTILE = "<img src=x onerror=globalThis.broken=1><script>globalThis.broken=1</script>"
Opens = Callable[..., Page]
Public = tuple[str, dict[str, bytes | str], list[str]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def site(populated: ServiceSettings, certificate: Path) -> Iterator[str]:
    """60 real references and 30 of each of two generators; whoever adds some takes them away again."""
    trusting = partial(public_client, ssl.create_default_context(cafile=str(certificate)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_worker, "public_client", trusting)
        patch.setattr(job_worker, "POLL", 0.2)
        with served(populated) as url:
            yield url


@pytest.fixture
def opens(browser: Browser, site: str) -> Iterator[Opens]:
    """Opens a view in a fresh session. At the end nothing may have gone wrong in it, seen or unseen."""
    contexts, watch = [], Watch(site)

    def visit(view: str = "detect", *, url: str = site, width: int = 1200, axe: bool = False, **options: Any) -> Page:
        watch.origin = url.partition("?")[0]
        size: ViewportSize = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, accept_downloads=True, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        if axe:
            context.add_init_script(path=AXE)  # from outside the page, where its policy does not reach
        page = context.new_page()
        watch.attach(page)
        page.goto(f"{url}#/{view}")
        return page

    yield visit
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("globalThis.broken") is None, "markup of a name or of metadata was run"
        context.close()
    assert watch.wrong == []


def choose(page: Page, *files: Any, view: str = "detect") -> Locator:
    """Choose files in a view, and wait for what comes of the first."""
    page.locator(f"#view-{view} input[type=file]").first.set_input_files(list(files))
    return page.locator("#view-detect .verdict, #view-detect .problem").first


def judge(page: Page, *files: Any, whole: bool = True) -> Locator:
    """The verdict on the first file; `whole` when it has all that belongs to it and is recorded."""
    choose(page, *(files or [picture()]))
    verdict = page.locator("#view-detect .verdict").first
    expect(verdict).to_be_visible()
    if whole:
        expect(verdict.locator(".coming")).to_have_count(0)
    return verdict


def alike(images: Locator) -> None:
    """Every thumbnail came through."""
    for image in images.all():
        expect(image).to_have_js_property("complete", True)
        expect(image).not_to_have_js_property("naturalWidth", 0)


# Detect


def test_a_verdict_tells_what_how_sure_and_why(opens: Opens) -> None:
    page = opens()
    expect(page.get_by_role("heading", level=1)).to_have_text("Was this image made by a generator?")
    verdict = judge(page, picture("a photo.png", texts={"parameters": "a castle, Steps: 20"}))
    headline = verdict.get_by_role("heading", level=2)
    expect(headline).to_have_text(re.compile("Probably generated|Probably a real photograph|Cannot tell"))
    expect(verdict.locator(".score")).to_have_text(re.compile(r"^Score (< )?[01]\.\d\d of 1\. .*real photo"))
    expect(verdict.locator(".meaning")).not_to_be_empty()
    expect(verdict.locator(".of")).to_have_text("a photo.png")
    # what was judged
    expect(verdict.locator(".crop .edge")).to_have_count(1)
    expect(verdict.locator("figcaption")).to_contain_text("inside the frame")
    expect(verdict.locator(".frame img")).to_have_js_property("naturalWidth", 96)
    regions = verdict.locator(".regions")
    expect(regions.locator("rect")).to_have_count(9)
    slider = verdict.get_by_role("slider", name="Regions")
    boxes, numbers = regions.locator(".boxes"), regions.locator(".numbers")
    expect(boxes).to_have_css("opacity", "0.4")
    expect(numbers).to_have_css("opacity", "1")
    for key, opacity in (("End", "1"), ("Home", "0")):
        slider.press(key)
        expect(boxes).to_have_css("opacity", opacity)
        expect(numbers).to_have_css("opacity", opacity)
    # why
    for kind, title in (("fake", "Nearest generated images"), ("real", "Nearest real photos")):
        row = verdict.get_by_role("list", name=title)
        expect(row.get_by_role("listitem")).to_have_count(5)
        expect(row.locator(".who").first).to_have_text(re.compile("gen-[ab]" if kind == "fake" else "real photo"))
        expect(row.locator(".like").first).to_have_text(re.compile(r"alike [01]\.\d{3}"))
        expect(row.locator(".weight").first).to_have_text(re.compile(r"weight .*%"))
        alike(row.locator("img"))
    expect(verdict.locator(".head-list > li")).to_have_count(4)
    expect(verdict.locator(".shares")).to_contain_text(re.compile("gen-[ab]"))
    expect(verdict.locator(".strip > li")).to_have_count(8)
    expect(verdict.locator(".provenance")).to_contain_text("a castle, Steps: 20")
    expect(verdict).to_contain_text("The file itself says that a generator made it. That did not enter the score.")
    expect(verdict.locator(".version")).to_contain_text("120 reference images, revision ")
    # a reference image by itself
    verdict.locator(".portrait").first.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("SHA-256")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_a_verdict_is_recorded_disputed_and_judged_again(opens: Opens) -> None:
    page = opens()
    verdict = judge(page, picture("disputed.png", seed=2))
    verdict.get_by_role("button", name="This is wrong").click()
    verdict.get_by_label("A real photo").check()
    verdict.get_by_label("How do you know?").fill(HOSTILE)
    verdict.get_by_role("button", name="Send").click()
    expect(verdict.locator(".done")).to_contain_text("Noted: you say it is real.")
    verdict.get_by_role("link", name="Record").click()
    record = page.locator("#view-record")
    expect(record.get_by_role("heading", level=1)).to_be_focused()
    expect(record).to_contain_text(f"Somebody (loopback) says that it is real. “{HOSTILE}”")
    expect(record.locator(".frame img")).to_have_count(1)
    record.get_by_role("button", name="Judge again").click()
    expect(record.locator(".today")).to_contain_text("The verdict stays")
    page.reload()  # now the image is not at hand any more
    expect(record.locator(".no-image")).to_have_text("The image itself is not kept.")
    page.get_by_role("link", name="Status").click()
    expect(page.locator("#view-status tr", has_text="disputed.png")).to_contain_text("disputed: real")


def test_a_disputed_verdict_becomes_a_reference_which_is_relabelled_and_taken_back(opens: Opens) -> None:
    page = opens(axe=True)
    verdict = judge(page, picture("wrong.png", seed=33))
    verdict.get_by_role("button", name="This is wrong").click()
    verdict.get_by_role("radio", name="Generated").check()
    verdict.get_by_role("button", name="Send").click()
    form = verdict.locator(".correction")
    expect(form).not_to_contain_text("not kept")  # this tab has it
    form.get_by_label("Made by the generator").fill("real")
    form.get_by_role("button", name="Make it a reference").click()
    expect(verdict.get_by_role("alert")).to_contain_text("real")
    form.get_by_label("Made by the generator").fill("gen-wrong")
    form.get_by_role("button", name="Make it a reference").click()
    expect(verdict.locator(".dispute")).to_contain_text("Enrolled with gen-wrong as reference")
    expect(verdict.locator(".dispute")).to_contain_text("Found by the vote")
    expect(verdict.locator(".dispute")).not_to_contain_text("was not kept")
    expect(form).to_be_hidden()
    assert violations(page) == []
    verdict.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo it").click()
    expect(verdict.locator(".dispute .done").last).to_have_text("Undone.")
    expect(form).to_be_visible()

    verdict.get_by_role("link", name="Record").click()
    page.reload()  # now the image is not at hand any more
    record = page.locator("#view-record")
    expect(record.locator(".correction")).to_contain_text("The image was not kept")
    record.get_by_label("Made by the generator").fill("gen-wrong")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    assert violations(page) == []
    record.get_by_role("button", name="Make it a reference").click()
    expect(record).to_contain_text("The image itself was not kept, so another checkpoint cannot embed it.")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.get_by_role("link", name="Detect", exact=True).click()
    again = judge(page, picture("wrong.png", seed=33))
    again.get_by_role("button", name="This is wrong").click()
    again.get_by_label("A real photo").check()
    again.get_by_role("button", name="Send").click()
    again.get_by_role("button", name="Relabel the reference").click()
    expect(again.locator(".dispute")).to_contain_text("is one of real photos now")
    again.get_by_role("button", name="Undo").click()
    expect(again.locator(".dispute")).to_contain_text("Undone: it is what it was.")
    expect(again.locator(".dispute .done").last).to_be_focused()
    [known] = page.request.get(f"{page.url.split('#')[0]}v1/references?generator=gen-wrong").json()["references"]
    back = page.request.patch(f"{page.url.split('#')[0]}v1/references/{known['id']}", data={"label": "real"})
    assert back.json()["attributes"]["former_generator"] == "gen-wrong"
    page.reload()  # and back to gen-wrong, which it was
    again = judge(page, picture("wrong.png", seed=33))
    again.get_by_role("button", name="This is wrong").click()
    again.get_by_role("radio", name="Generated").check()
    again.get_by_role("button", name="Send").click()
    again.get_by_label("Made by the generator").fill("gen-wrong")
    again.get_by_role("button", name="Relabel the reference").click()
    expect(again.locator(".dispute")).to_contain_text("is one of gen-wrong now")
    expect(again.locator(".dispute .done").last).to_be_focused()
    again.get_by_role("button", name="Undo").click()
    expect(again.locator(".dispute")).to_contain_text("Undone: it is what it was.")
    [known] = page.request.get(f"{page.url.split('#')[0]}v1/references?newest=true&limit=1").json()["references"]
    page.request.delete(f"{page.url.split('#')[0]}v1/references/{known['id']}")
    page.request.delete(f"{page.url.split('#')[0]}v1/generators/gen-wrong")


def test_a_bookmarklet_brings_an_image_of_another_site(
    public_files: Public, trust: ssl.SSLContext, opens: Opens, site: str
) -> None:
    gallery, files, asked = public_files
    files["/"] = (
        b"<!doctype html><img src=a.png style='position: absolute'><div style='position: relative; height: 99px'>"
    )
    files["/a.png"] = picture(seed=77)["buffer"]
    page = opens(url=f"{gallery}/", ignore_https_errors=True)
    [bookmarklet] = re.findall(r"```js\n(.*?)\n```", DEPLOYMENT.read_text(), re.DOTALL)
    assert bookmarklet.count("\n") < 10
    page.evaluate("(code) => { location.href = code }", bookmarklet.replace("http://127.0.0.1:8000/", site))
    with page.context.expect_page() as opened:
        page.mouse.click(50, 50)
    lineup = opened.value
    expect(lineup.get_by_label("Or the address of an image")).to_have_value(f"{gallery}/a.png")
    lineup.get_by_role("button", name="Judge it").press("Enter")
    verdict = lineup.locator("#view-detect .verdict")
    expect(verdict.locator(".of")).to_have_text(f"{gallery}/a.png")
    expect(verdict.locator(".strip > li")).to_have_count(8)
    assert asked.count("/a.png") == 2  # by the browser for the gallery, and by the service
    lineup.get_by_label("Or the address of an image").fill(f"{gallery}/b.png")
    lineup.get_by_label("Or the address of an image").press("Enter")
    expect(lineup.get_by_role("alert")).to_contain_text("HTTP 404")
    assert lineup.request.get(f"{site}v1/jobs").json()["jobs"] == []


def test_the_verdict_comes_before_what_takes_longer(opens: Opens) -> None:
    page = opens(axe=True)
    held: list[Route] = []
    page.route(re.compile("explain="), lambda route: held.append(route))
    verdict = judge(page, picture("slow.png", seed=12), whole=False)
    expect(verdict.locator(".coming")).to_contain_text("still being scored")
    expect(verdict.locator(".line-up .suspect")).to_have_count(10)
    expect(page.locator("#view-detect .counter")).to_have_text(["1 of 1", "0 of 1"])
    expect(verdict.get_by_role("link", name="Record")).to_have_count(0)
    assert violations(page) == []
    neighbour = verdict.locator(".portrait").nth(3)
    neighbour.focus()
    name = neighbour.get_attribute("aria-label") or ""
    held.pop().continue_()
    expect(verdict.locator(".strip > li")).to_have_count(8)
    expect(verdict.locator(".regions rect")).to_have_count(9)
    expect(verdict.get_by_role("button", name=name)).to_be_focused()
    verdict.get_by_role("link", name="Record").click()
    expect(page.locator("#view-record .strip > li")).to_have_count(8)
    page.get_by_role("link", name="Status").click()
    expect(page.get_by_role("link", name="slow.png")).to_have_count(1)  # asked twice, kept once


def test_a_verdict_stands_although_what_follows_fails(opens: Opens) -> None:
    page = opens(axe=True)
    page.route(re.compile("explain="), problem("internal", 500, "The server failed"))
    verdict = judge(page, picture("half.png", seed=13))
    expect(page.get_by_role("alert")).to_contain_text("The server failed")
    expect(page.locator(".tally")).to_contain_text("1 incomplete")
    expect(verdict.get_by_role("button", name="This is wrong")).to_have_count(0)  # there is no record
    assert violations(page) == []
    page.unroute(re.compile("explain="))
    page.get_by_role("button", name="Try again").click()
    expect(verdict.locator(".strip > li")).to_have_count(8)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_simulated_references_are_called_simulated(opens: Opens) -> None:
    page = opens()
    expect(page.locator(".known")).to_contain_text("60 real photos and 60 images by 2 generators: gen-a, gen-b.")
    expect(page.locator(".known .note")).to_have_count(0)
    status = page.request.get(page.url.split("#")[0] + "v1/status").json()
    page.route("**/v1/status", fulfilled(json.dumps(status | {"sources": [{"name": "simulated", "references": 120}]})))
    page.reload()
    expect(page.locator(".known .note")).to_contain_text("All references are simulated")
    simulated = {**NEIGHBOUR, "source": "simulated", "thumbnail": None, "uri": None, "attributes": {}}
    for source, notes in (("simulated", 1), ("camera", 0)):
        body = {"results": [BARE | {"degraded": False, "neighbours": [simulated | {"source": source}]}]}
        page.route("**/v1/detect*", fulfilled(json.dumps(body)))
        verdict = judge(page)
        expect(verdict.locator(".note", has_text="Compared with simulated images only")).to_have_count(notes)
        page.get_by_role("button", name="Clear").click()


def test_several_images_are_judged_counted_and_exported(opens: Opens) -> None:
    page = opens()
    names = ["=1,2.png", *(f"{number}.png" for number in range(1, 5))]
    pictures = [picture(name, number, fake=number % 2 == 0) for number, name in enumerate(names)]
    choose(page, *pictures, other_file("notes.txt", b"not an image"))
    rows = page.locator("#view-detect details.one")
    expect(rows).to_have_count(5)
    expect(page.locator(".tally")).to_contain_text("1 failed")
    expect(page.locator("#view-detect .progress")).to_be_hidden()
    expect(page.locator("#view-detect .counter")).to_have_text(["6 of 6", "6 of 6"])
    expect(page.get_by_role("alert")).to_contain_text("Not an image of an accepted format")
    expect(page.locator("#announcer")).to_contain_text("Done: ")
    with page.expect_download() as download:
        page.get_by_role("button", name="as JSON").click()
    exported = json.loads(Path(download.value.path()).read_text())["results"]
    assert [item["file"] for item in exported] == [*names, "notes.txt"]
    assert all("neighbours" in item for item in exported[:5])
    assert exported[5]["error"]["status"] == 415
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all as CSV").click()
    table = io.BytesIO()
    write_csv(map(row, exported), table)
    assert read_table(Path(download.value.path()).read_bytes()) == read_table(table.getvalue())
    rows.first.locator("summary").first.press("Enter")
    expect(rows.first.locator(".line-up")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(rows).to_have_count(0)


def read_table(content: bytes) -> list[dict[str, str | float]]:
    """The rows of a CSV file; numbers as such, however they are written."""

    def value(cell: str) -> str | float:
        try:
            return float(cell)
        except ValueError:
            return cell

    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    return [{name: value(cell) for name, cell in one.items()} for one in table]


def test_images_are_dropped_and_pasted(opens: Opens) -> None:
    page = opens()
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return transfer;
        }""",
        list(picture(seed=3)["buffer"]),
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#view-detect .intake")).to_have_class(re.compile("over"))
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator(".verdict .of")).to_have_text(["dropped.png"])
    page.evaluate(
        "(data) => document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))",
        transfer,
    )
    expect(page.locator(".verdict")).to_have_count(2)


def test_a_folder_is_judged_and_what_is_no_image_is_left_out(opens: Opens, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    names = ["beach/2.png", "beach/10.png", "town/1.png"]
    for number, name in enumerate(names[::-1]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed=80 + number)["buffer"])
    (folder / "notes.txt").write_text("no image")
    page = opens()
    view = page.locator("#view-detect")
    page.get_by_label("Also score regions").uncheck()
    view.locator("input[webkitdirectory]").set_input_files(folder)
    expect(view.locator("details.one .file")).to_have_text([f"holiday/{name}" for name in names])
    expect(view).to_contain_text("1 other file of the folder left out.")
    expect(view.get_by_role("alert")).to_have_count(0)


def test_a_known_image_says_so(opens: Opens, image_folder: Path) -> None:
    page = opens()
    verdict = judge(page, image_folder / "fake" / "gen-a" / "001.png")
    expect(verdict.get_by_role("heading", level=2)).to_have_text("Known generated image")
    expect(verdict).to_contain_text("This very file is in the reference set as a generated image by gen-a.")


def test_one_verdict_prints_on_one_page(opens: Opens) -> None:
    page = opens()
    long = dict.fromkeys(("parameters", "prompt", "Comment", "Description", "Software"), f"{HOSTILE} " * 40)
    judge(page, picture("first.png", 4, texts=long))
    choose(page, picture("second.png", seed=5))
    expect(page.locator(".verdict")).to_have_count(2)
    page.evaluate("globalThis.print = () => {}")
    for paper in ("A4", "Letter"):
        page.locator(".verdict", has_text="first.png").get_by_role("button", name="Print").click()
        assert page.pdf(format=paper).count(b"/Type /Page\n") == 1  # after which the rest of the page is there again
    assert page.pdf(format="A4").count(b"/Type /Page\n") == 2


BARE: dict[str, Any] = {
    "id": "6a9791ba-7c7e-4df6-b283-a32e64590fc8",
    "file": "bare.png",
    "verdict": "uncertain",
    "basis": "score",
    "score": None,
    "probability": None,
    "false_alarm": None,
    "reason": "nothing is calibrated: the checkpoint lacks heads",
    "thresholds": {"fake": None, "real": None},
    "known": None,
    "heads": {"knn": None, "nn1": None, "linear": None, "svm": None},
    "generators": [],
    "unknown_generator": False,
    "novelty": None,
    "neighbours": [],
    "provenance": {},
    "image": {"sha256": "0" * 64, "width": 96, "height": 96, "format": "PNG", "crop": [0, 0, 96, 96]},
    "model": {"checkpoint": "c", "heads": None, "name": "tiny", "engine": "torch"},
    "index": {"revision": 0, "size": 0},
    "calibration": None,
    "degraded": True,
    "timings_ms": {},
}
NEIGHBOUR = {"id": 7, "label": "fake", "generator": None, "source": None, "similarity": 0.5, "weight": 1.0}


def fulfilled(body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(body=body, content_type="application/json")


def test_a_verdict_of_nothing_but_nulls(opens: Opens) -> None:
    page = opens()
    far = {**NEIGHBOUR, "thumbnail": None, "uri": None, "attributes": {}}
    for neighbours in ([], [far]):
        page.route("**/v1/detect*", fulfilled(json.dumps({"results": [BARE | {"neighbours": neighbours}]})))
        verdict = judge(page)
        expect(verdict.get_by_role("heading", level=2)).to_have_text("Cannot tell")
        expect(verdict).to_contain_text("No score: nothing is calibrated: the checkpoint lacks heads.")
        expect(verdict).to_contain_text("The database or the search engine is away.")
        expect(verdict.locator(".head-list")).to_contain_text("no answer")
        expect(verdict.get_by_role("link", name="Record")).to_have_count(0)
        page.get_by_role("button", name="Clear").click()


def test_a_reference_whose_picture_is_elsewhere_is_a_link(opens: Opens) -> None:
    page = opens(axe=True)
    public = {**NEIGHBOUR, "source": "who", "thumbnail": None, "uri": "https://example.org/a b.png", "attributes": {}}
    other = public | {"id": 8, "uri": "javascript:globalThis.broken=1"}
    hub = public | {"id": 9, "uri": "hf://datasets/who/what@c0ffee/data/a.parquet#image_gen0/5"}
    body = {"results": [BARE | {"degraded": False, "neighbours": [public, other, hub]}]}
    page.route("**/v1/detect*", fulfilled(json.dumps(body)))
    verdict = judge(page)
    link = verdict.locator(".suspect a")
    expect(link).to_have_count(2)
    expect(link.first).to_have_attribute("href", "https://example.org/a b.png")
    file = "https://huggingface.co/datasets/who/what/blob/c0ffee/data/a.parquet"
    expect(link.last).to_have_attribute("href", file)
    assert violations(page) == []
    verdict.get_by_role("button", name="Reference image 7: details").click()
    expect(page.locator("#reference-dialog")).to_contain_text("Its picture is not here.")


def test_a_picture_that_could_not_be_looked_up_is_not_called_missing(opens: Opens) -> None:
    page = opens()
    far = {**NEIGHBOUR, "thumbnail": None, "uri": None, "attributes": {}}
    page.route("**/v1/detect*", fulfilled(json.dumps({"results": [BARE | {"neighbours": [far]}]})))
    judge(page).get_by_role("button", name="Reference image 7: details").click()
    expect(page.locator("#reference-dialog")).to_contain_text(
        "Its picture could not be looked up: the database was away."
    )


def test_every_window_that_was_judged_is_framed(opens: Opens) -> None:
    """Two windows of 40 x 40 pixels that share half, and one apart: 2,400 and 1,600 pixels of 9,216."""
    page = opens()
    windows = [[0, 0, 40, 40], [20, 0, 40, 40], [56, 56, 40, 40]]
    image = BARE["image"] | {"crop": [0, 0, 96, 96], "windows": windows}
    page.route("**/v1/detect*", fulfilled(json.dumps({"results": [BARE | {"image": image}]})))
    verdict = judge(page)
    expect(verdict.locator(".crop .edge")).to_have_count(3)
    expect(verdict.locator("figcaption")).to_have_text(
        "Judged: what is inside the frames, 3 windows of 40 × 40 pixels, 43 % of the image."
    )
    expect(verdict.locator(".marks")).to_have_attribute(
        "aria-label", "The frames show what was judged: 3 windows of 40 × 40 pixels."
    )
    shade = verdict.locator(".crop .outside")
    for x, y, shaded in ((10, 10, False), (30, 10, False), (70, 70, False), (70, 20, True), (20, 70, True)):
        assert shade.evaluate(f"path => path.isPointInFill(new DOMPoint({x}, {y}))") is shaded


def ruled(verdict: str, score: float | None, false_alarm: float | None = 0.05, **changed: object) -> dict[str, Any]:
    thresholds = {"fake": 0.8479, "real": 0.14}
    return (
        EXAMPLE_VERDICT
        | {"verdict": verdict, "score": score, "false_alarm": false_alarm, "thresholds": thresholds}
        | changed
    )


BETWEEN = "the score lies between the thresholds"
SMALL = "too small to judge: 60x40 pixels, where 112 a side are needed"
RULED = [
    ruled("uncertain", 0.8478, reason=BETWEEN),
    ruled("uncertain", 0.1402, 0.6, reason=BETWEEN),
    ruled("real", 0.1398, 1.0),
    ruled("fake", 0.85, 0.001),
    ruled("real", 0.0001, 0.997),
    ruled("fake", 0.8479, 0.0),
    ruled("fake", 0.99999, 0.0, calibration=None),
    ruled("fake", 0.9, 0.0037, calibration=None),
    ruled("uncertain", 0.5, reason="a miss rate of 0.01 needs 40 more fake calibration images"),
    ruled("uncertain", None, None, reason="nothing is calibrated"),
    ruled("uncertain", None, None),
    ruled("uncertain", None, None, reason=SMALL, image=EXAMPLE_VERDICT["image"] | {"shortfall": SMALL}),
    ruled("fake", 0.5, basis="known", known={"id": 7, "label": "fake", "generator": "SD-XL"}),
    ruled("real", None, None, basis="known", known={"id": 7, "label": "real", "generator": None}),
]


def test_page_and_terminal_say_the_same(opens: Opens) -> None:
    page = opens()
    words = """async (verdict) => {
        const { headline, figure, rarity, meaning } = await import("/words.js");
        return [headline(verdict), verdict.score === null ? null : figure(verdict), rarity(verdict), meaning(verdict)];
    }"""
    for json_verdict in RULED:
        verdict = Verdict.model_validate(json_verdict)
        title, figure, rarity, meaning = page.evaluate(words, verdict.model_dump(mode="json"))
        assert (title, rarity, meaning) == (
            terminal.headline(verdict),
            terminal.rarity(verdict),
            terminal.meaning(verdict),
        )
        assert figure is None or f"core {figure} of 1." in terminal.in_words(verdict)
    said = [terminal.in_words(Verdict.model_validate(one)) for one in RULED]
    assert "Score 0.8478 of 1." in said[0]
    assert "“generated” from 0.8479 on" in said[0]
    assert "Score 0.1402 of 1." in said[1]
    assert "Score 0.1398 of 1." in said[2]
    assert "“real” below 0.1400." in said[2]


def test_a_score_that_surprises_is_explained(opens: Opens) -> None:
    page = opens()
    near = [{**NEIGHBOUR, "weight": 0.05}] * 9 + [{**NEIGHBOUR, "label": "real", "weight": 0.5}]
    body = {"results": [ruled("uncertain", 0.8478, reason=BETWEEN, neighbours=near)]}
    page.route("**/v1/detect*", fulfilled(json.dumps(body)))
    heads = judge(page).locator(".heads")
    expect(heads).to_contain_text(
        "Of the 10 nearest of either kind, 9 generated and 1 real weigh 45 % and 50 %; with those further down"
    )
    for head, adds in (("Vote", "1.20"), ("Linear", "2.10"), ("Outlier", "0.70")):
        expect(heads.get_by_role("listitem").filter(has_text=head)).to_contain_text(f"It adds +{adds} to the sum.")
    expect(heads.locator(".sum")).to_contain_text(
        "+1.20 +2.10 +0.70 −0.50 (bias, from the calibration images) = +3.50."
    )


def test_copies_with_too_little_to_judge_get_no_word(opens: Opens) -> None:
    page = opens()
    held = {"scores": {"jpeg-90": 0.9, "jpeg-70": 0.88, "scale-0.5": None}, "spread": 0.02, "flips": False}
    page.route("**/v1/detect*", fulfilled(json.dumps({"results": [ruled("fake", 0.9, stability=held)]})))
    found = judge(page).locator(".stability")
    expect(found.locator(".lead")).to_have_text(
        "The verdict stays the same under all 2 re-encodings. The scores differ by 0.02 at most. "
        "1 more holds too little to be judged."
    )
    expect(found.locator(".strip li").last).to_have_text(re.compile("50.%–no score"))
    expect(found.locator(".badge")).to_have_count(3)
    words = "async (verdict) => (await import('/words.js')).stabilityWords(verdict)"
    none = {"scores": {"scale-0.5": None}, "spread": None, "flips": False}
    assert page.evaluate(words, ruled("fake", 0.9, stability=none)) == "No re-encoded copy holds enough to be judged."
    unscored = ruled("uncertain", None, None, stability=none)
    assert page.evaluate(words, unscored) == "There is no score that could change."


def test_only_a_verdict_by_score_is_said_to_change_with_the_encoding(opens: Opens) -> None:
    text = "async (verdict) => (await import('/verdict.js')).account(verdict).textContent"
    flip = {"scores": {"jpeg-90": 0.5}, "spread": 0.4, "flips": True}
    known: dict[str, Any] = {"basis": "known", "known": {"id": 7, "label": "fake", "generator": "SD-XL"}}
    page, caution = opens(), "The verdict changes when the image is re-encoded or rescaled."
    assert caution in page.evaluate(text, ruled("fake", 0.9, stability=flip))
    of_known = page.evaluate(text, ruled("fake", 0.9, stability=flip, **known))
    assert caution not in of_known
    assert "A re-encoded copy is no longer the known file: its score decides." in of_known


def test_regions_that_lean_to_either_side_show_different_scores(opens: Opens) -> None:
    page = opens()
    scores = {0.498: "0.498", 0.502: "0.502", 0.5: "0.50", 0.49996: "0.49996", 0.81: "0.81"}
    regions = [{"box": [20 * n, 0, 20, 20], "score": score, "generator": "SD-XL"} for n, score in enumerate(scores)]
    page.route("**/v1/detect*", fulfilled(json.dumps({"results": [ruled("fake", 0.9, regions=regions)]})))
    found = judge(page).locator(".picture")
    expect(found.locator(".numbers text")).to_have_text(list(scores.values()))
    for box, score in zip(found.locator(".boxes title").all(), scores.values(), strict=True):
        assert str(box.text_content()).startswith(f"Score {score}")
    cells = found.locator(".region-list tbody td:nth-child(3)")
    assert cells.all_text_contents() == list(scores.values())


def test_a_black_image_gets_no_verdict_and_the_reason(opens: Opens) -> None:
    page = opens()
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96)).save(buffer, format="PNG")
    verdict = judge(page, other_file("black.png", buffer.getvalue()))
    why = "Too flat to judge: brightness varies by 0.0 of 255, where 3 are needed."
    for _ in ("at once", "from its record"):
        expect(verdict.get_by_role("heading", level=2)).to_have_text("Cannot tell")
        expect(verdict.locator(".meaning")).to_have_text(f"{why} Lineup says nothing rather than guess.")
        expect(verdict.locator(".heads .lead")).to_contain_text("none can be trusted with so little to see")
        expect(verdict.locator(".score, .scale, .heads .sum, .stability, .regions")).to_have_count(0)
        if (link := verdict.get_by_role("link", name="Record")).count():
            link.click()
            verdict = page.locator("#view-record .verdict")


def test_the_strictness_asked_for_is_sent_and_told(opens: Opens) -> None:
    page = opens()
    page.get_by_label("Real photos called generated").select_option("0.1")
    page.get_by_label("Also score regions").uncheck()
    with page.expect_request("**/v1/detect*") as request:
        verdict = judge(page, picture(seed=6))
    assert request.value.url.endswith("?max_false_alarm=0.1")
    expect(verdict.locator(".strip, .regions")).to_have_count(0)


def test_without_records_the_page_offers_none(opens: Opens, populated: ServiceSettings) -> None:
    with served(populated, record=False) as url:
        verdict = judge(opens(url=url))
        expect(verdict.get_by_role("button", name="Print")).to_be_visible()
        expect(verdict.get_by_role("link", name="Record")).to_have_count(0)
        expect(verdict.get_by_role("button", name="This is wrong")).to_have_count(0)


# Search


def test_search_filters_and_pages(opens: Opens) -> None:
    page = opens("search")
    page.locator("#view-search input[type=file]").set_input_files([picture()])
    gallery = page.get_by_role("list", name="Reference images, nearest first")
    expect(gallery.get_by_role("listitem")).to_have_count(24)
    alike(gallery.locator("img"))
    first = gallery.locator(".portrait").first.get_attribute("aria-label")
    page.get_by_role("button", name="Further").click()
    expect(page.locator("#view-search .pager")).to_contain_text("Nearest 25 to 48")
    expect(gallery.locator(".portrait").first).not_to_have_attribute("aria-label", first or "")
    page.get_by_role("button", name="Nearer").click()
    expect(page.locator("#view-search .pager")).to_contain_text("Nearest 1 to 24")
    page.locator("#view-search").get_by_label("Generator").select_option("gen-b")
    expect(gallery.locator(".who", has_text="gen-b")).to_have_count(24)
    page.get_by_role("button", name="Further").click()
    expect(page.get_by_role("button", name="Further")).to_be_disabled()
    page.locator("#view-search").get_by_label("Generator").select_option("")
    page.locator("#view-search").get_by_label("Kind").select_option("real")
    expect(gallery.locator(".who", has_text="real photo")).to_have_count(24)
    page.locator("#view-search").get_by_label("Source").fill("nowhere")
    page.locator("#view-search").get_by_label("Source").press("Enter")
    expect(page.locator("#view-search .none")).to_have_text("No reference image fits these filters.")


# References


def test_references_are_filtered_relabelled_compared_and_removed(opens: Opens) -> None:
    page = opens("generators")
    view, dialog = page.locator("#view-references"), page.get_by_role("dialog")
    page.locator("#view-generators input[type=file]").first.set_input_files([picture(seed=n) for n in (400, 401)])
    page.locator("#view-generators").get_by_label("Generator", exact=True).fill("gen-w")
    page.locator("#view-generators").get_by_role("button", name="Enrol", exact=True).click()
    expect(page.locator("#view-generators .report")).to_contain_text("2 images added")
    page.get_by_role("link", name="References", exact=True).click()
    gallery = view.get_by_role("list", name="Reference images")
    cards = gallery.get_by_role("listitem")
    expect(cards).to_have_count(48)
    expect(cards.nth(1).locator(".who")).to_have_text("gen-w")  # the newest first
    view.get_by_role("button", name="On").click()
    expect(view.locator(".pager")).to_contain_text("Page 2")
    view.get_by_role("button", name="Back").click()
    expect(view.locator(".pager")).to_contain_text("Page 1")
    view.get_by_label("Order").select_option("generator")
    expect(cards.nth(1).locator(".who")).to_have_text("real photo")
    view.get_by_label("Generator").select_option("gen-w")
    expect(cards).to_have_count(2)
    alike(gallery.locator("img"))

    view.get_by_label("All on this page").check()
    expect(view.locator(".counter")).to_have_text("2 selected")
    view.get_by_role("button", name="Relabel…", exact=True).click()
    dialog.get_by_label("It is").select_option("real")
    expect(dialog.get_by_label("Generator")).to_be_hidden()
    dialog.get_by_role("button", name="Relabel").click()
    expect(view.locator(".done")).to_have_text("2 references relabelled.")
    expect(view.locator(".none")).to_have_text("No reference image fits these filters.")
    view.get_by_role("button", name="Undo").click()
    expect(view.locator(".done")).to_have_text("2 references taken back.")
    expect(cards).to_have_count(2)

    cards.first.locator(".portrait").click()
    dialog.get_by_role("link", name="Relabel or compare").press("Enter")
    title = view.get_by_role("heading", level=2)
    expect(title).to_have_text(re.compile(r"Reference \d+: gen-w"))
    expect(dialog).to_have_count(0)
    expect(view.get_by_label("Order")).to_be_hidden()
    expect(view.get_by_label("Generator")).to_have_value("")  # what is similar may be of any kind
    expect(cards.nth(1)).to_be_visible()
    view.get_by_role("button", name="Relabel it…").click()
    dialog.get_by_label("Generator").fill("gen-v")
    dialog.get_by_label("Generator").press("Enter")
    expect(title).to_have_text(re.compile(r"Reference \d+: gen-v"))
    view.get_by_role("button", name="Back to gen-w").click()
    expect(title).to_have_text(re.compile(r"Reference \d+: gen-w"))
    for kind in ("gen-v", "gen-w"):  # that can be undone as well, and so can this
        view.get_by_role("button", name="Undo").click()
        expect(title).to_have_text(re.compile(rf"Reference \d+: {kind}"))
    view.get_by_role("button", name="Remove it…").click()
    dialog.get_by_role("button", name="Cancel").click()
    view.get_by_role("button", name="Remove it…").click()
    dialog.get_by_role("button", name="Remove", exact=True).click()
    expect(view.locator(".done")).to_have_text("1 reference removed.")
    expect(cards).to_have_count(1)  # of the filter that the gallery had before
    cards.first.get_by_role("link", name="Similar").press("Enter")
    expect(title).to_be_visible()
    view.get_by_role("link", name="All reference images").click()
    expect(title).to_have_count(0)
    cards.first.get_by_role("checkbox").check()
    page.route("**/v1/references/*", problem("forbidden", 403, "Not allowed"))
    view.get_by_role("button", name="Remove…", exact=True).click()
    dialog.get_by_role("button", name="Remove", exact=True).click()
    expect(view.get_by_role("alert")).to_contain_text("Not allowed")
    expect(view.locator(".done")).to_have_text("0 references removed.")
    page.unroute("**/v1/references/*")
    cards.first.get_by_role("checkbox").check()
    view.get_by_role("button", name="Remove…", exact=True).click()
    dialog.get_by_role("button", name="Remove", exact=True).click()
    expect(view.locator(".done")).to_have_text("1 reference removed.")
    for name in ("gen-w", "gen-v"):
        page.get_by_role("link", name="Generators", exact=True).click()
        page.get_by_role("button", name=f"Delete {name}").click()
        dialog.get_by_role("button", name="Delete it").click()
        expect(page.get_by_role("button", name=f"Delete {name}")).to_have_count(0)


def test_a_busy_service_is_waited_for_and_what_others_removed_is_passed_over(opens: Opens) -> None:
    page = opens("references")
    root, view, dialog = page.url.split("#")[0], page.locator("#view-references"), page.get_by_role("dialog")
    fields: dict[str, Any] = {"label": "fake", "generator": "gen-u"}
    for seed in (420, 421):
        assert page.request.post(f"{root}v1/references", multipart=fields | {"images": picture(seed=seed)}).ok
    first, _ = page.request.get(f"{root}v1/references?generator=gen-u").json()["references"]
    page.reload()
    names = page.locator("datalist#generator-names")
    expect(names).to_have_count(1)
    expect(names.locator("option[value=gen-u]")).to_have_count(1)
    view.get_by_label("Generator").select_option("gen-u")
    cards = view.get_by_role("list", name="Reference images").get_by_role("listitem")
    expect(cards).to_have_count(2)
    view.get_by_label("All on this page").check()
    assert page.request.delete(f"{root}v1/references/{first['id']}").ok
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/v1/references/*", hold_first)
    view.get_by_role("button", name="Remove…", exact=True).click()
    dialog.get_by_role("button", name="Remove", exact=True).click()
    expect(view.locator(".selection[inert]")).to_have_count(1)
    problem("too-many-requests", 429, "Too many requests", **{"retry-after": "0.05"})(held[0])
    expect(view.locator(".done")).to_have_text("1 reference removed. 1 reference had been removed already.")
    expect(view.locator(".done")).to_be_focused()
    expect(view.locator("[inert]")).to_have_count(0)
    page.request.delete(f"{root}v1/generators/gen-u")


# Generators


def test_the_map_is_waited_for_and_without_a_shift_key_a_box_lets_the_lasso_add(opens: Opens) -> None:
    page = opens("references")
    page.route("**/v1/map", problem("not-ready", 503, "Not ready", **{"retry-after": "0.05"}), times=1)
    page.route("**/thumbnail", problem("not-found", 404, "Not found"))
    page.get_by_role("link", name="See them as a map").click()
    view = page.locator("#view-map")
    canvas, count = view.get_by_role("application", name="Map of the references"), view.locator(".counter")

    def lasso(left: float, right: float) -> None:
        """Around what lies between these shares of the width."""
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box
        corners = ((left, 0.01), (right, 0.01), (right, 0.99), (left, 0.99))
        for number, (x, y) in enumerate(corners):
            page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
            if not number:
                page.mouse.down()
        page.mouse.up()

    lasso(0.01, 0.51)
    expect(count).not_to_have_text("0 selected")
    pictured = view.get_by_role("list", name="Selected references").get_by_role("link")
    expect(pictured.first).to_have_text(re.compile(r"\d+, (real photos|gen-[ab])"))
    view.get_by_label("Add to the selection").check()
    lasso(0.49, 0.99)
    told = view.get_by_text(re.compile(r"^\d+ references\. The axes")).inner_text()
    shown = told.split()[0]  # the service may have drawn its map anew, with others
    expect(count).to_have_text(f"{shown} selected")


def drawn(canvas: Locator, element: Locator, style: str) -> int:
    """Pixels of a canvas in a colour that an element has."""
    colour = element.evaluate(f"element => getComputedStyle(element).{style}.match(/\\d+/g).map(Number)")
    return int(
        canvas.evaluate(
            """(canvas, colour) => {
                const { width, height } = canvas;
                const pen = new OffscreenCanvas(width, height).getContext("2d");
                pen.drawImage(canvas, 0, 0);
                const { data } = pen.getImageData(0, 0, width, height);
                let pixels = 0;
                for (let at = 0; at < data.length; at += 4) pixels += colour.every((part, n) => data[at + n] === part);
                return pixels;
            }""",
            colour,
        )
    )


def test_references_are_selected_on_the_map_relabelled_and_removed(opens: Opens) -> None:
    page = opens("status", axe=True)
    root, view, dialog = page.url.split("#")[0], page.locator("#view-map"), page.get_by_role("dialog")
    for seed in (410, 411):
        fields: dict[str, Any] = {"label": "fake", "generator": "gen-m", "images": picture(seed=seed)}
        assert page.request.post(f"{root}v1/references", multipart=fields).ok
    while "gen-m" not in page.request.get(f"{root}v1/map").text():
        page.wait_for_timeout(50)
    page.get_by_role("link", name="References", exact=True).click()
    page.get_by_role("link", name="See them as a map").click()
    legend = view.get_by_role("list", name="Kinds of references").get_by_role("listitem")
    expect(legend).to_have_text(["real photos 60", "gen-a 30", "gen-b 30", "gen-m 2"])
    assert violations(page) == []
    canvas, count = view.get_by_role("application", name="Map of the references"), view.locator(".counter")
    canvas.focus()
    for key in (*["PageUp"] * 12, "ArrowLeft", " "):
        page.keyboard.press(key)
    expect(count).to_have_text(re.compile(r"^\d{2,3} selected"))
    page.keyboard.press("Escape")
    expect(count).to_have_text("0 selected")
    expect(view.get_by_role("button", name="Remove…")).to_be_disabled()

    boxes = legend.get_by_role("checkbox")
    for name, state in (("Show none", False), ("Show all", True), ("Show none", False)):
        view.get_by_role("button", name=name).click()
        for box in boxes.all():
            expect(box).to_be_checked(checked=state)
    view.get_by_label("gen-m").check()

    def lasso() -> None:
        """Around everything that is shown."""
        canvas.hover(position={"x": 2, "y": 2})
        page.mouse.down()
        box = canvas.bounding_box()
        assert box
        for x, y in ((1, 0), (1, 1), (0, 1)):
            page.mouse.move(box["x"] + 2 + x * (box["width"] - 4), box["y"] + 2 + y * (box["height"] - 4))
        page.mouse.up()

    shade, ink = legend.filter(has_text="gen-m").locator(".swatch"), page.locator("body")
    assert [drawn(canvas, shade, "backgroundColor"), drawn(canvas, ink, "color")] == [2 * 6**2, 0]
    lasso()
    expect(count).to_have_text("2 selected")
    assert [drawn(canvas, shade, "backgroundColor"), drawn(canvas, ink, "color")] == [2 * 6**2, 2 * (8**2 - 6**2)]
    alike(view.locator(".chosen-points img"))
    assert violations(page) == []
    view.get_by_role("button", name="Relabel…").click()
    dialog.get_by_label("Generator").fill("gen-n")
    dialog.get_by_role("button", name="Relabel").click()
    expect(view.locator(".done")).to_have_text("2 references relabelled.")
    expect(legend.filter(has_text="gen-n")).to_contain_text("2")
    view.get_by_role("button", name="Undo").click()
    expect(legend.filter(has_text="gen-m")).to_contain_text("2")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    view.get_by_role("button", name="Remove…").click()
    dialog.get_by_role("button", name="Remove").click()
    expect(view.locator(".done")).to_have_text("2 references removed.")
    expect(legend).to_have_count(3)
    for name in ("gen-m", "gen-n"):
        page.request.delete(f"{root}v1/generators/{name}")


def test_a_folder_is_enrolled_reported_and_undone(opens: Opens, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for number in range(34):  # more than one request takes
        (folder / f"{number}.png").write_bytes(picture(seed=100 + number)["buffer"])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "readme.txt").write_text("no image")
    page = opens("generators")
    view = page.locator("#view-generators")
    expect(view.get_by_role("row", name="gen-a").first).to_contain_text("30")
    expect(view.get_by_role("button", name="Enrol", exact=True)).to_be_disabled()
    view.locator("input[webkitdirectory]").set_input_files(folder)
    expect(view.locator(".chosen")).to_contain_text("35 images chosen")
    expect(view.locator(".chosen")).to_contain_text("1 other file left out")
    view.get_by_label("Generator", exact=True).fill("gen-c")
    view.get_by_label("Source").fill(HOSTILE)
    view.get_by_role("button", name="Enrol", exact=True).click()
    report = view.locator(".report")
    expect(report).to_contain_text("Enrolled: gen-c")
    expect(report).to_contain_text("34 images added")
    expect(report).to_contain_text("1 file could not be used")
    effect = r"Found by the vote.*before\d+ of 32 \(\d+\s%\).*after\d of 2 \(\d+\s%\)"
    expect(report.locator(".effect").first).to_contain_text(re.compile(effect, re.S))
    expect(report).to_contain_text("Sent in 2 parts")
    expect(report.locator(".effect").last).to_contain_text(
        re.compile(r"False alarms of the vote.*before.*%.*after.*%", re.S)
    )
    expect(view.get_by_role("row", name="gen-c").first).to_contain_text(re.compile(r"34.*\d\s%.*→.*\d\s%"))
    sent = view.get_by_role("row").filter(has_text=HOSTILE)  # in two requests, which is nobody's concern
    expect(sent).to_have_count(1)
    expect(sent).to_contain_text(re.compile(r"^\d+–\d+"))
    expect(sent).to_contain_text("34")
    report.get_by_role("button", name="Undo").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(view.get_by_role("row", name="gen-c").first).to_contain_text("34")
    report.get_by_role("button", name="Undo").click()
    page.get_by_role("dialog").get_by_role("button", name="Undo it").click()
    expect(view.locator(".done")).to_have_text("Undone: 34 references removed.")
    expect(view.get_by_role("row").filter(has_text="gen-c").filter(has_text="undone")).to_have_count(1)
    view.get_by_label("Generator", exact=True).fill("gen-c")
    view.locator("input[webkitdirectory]").set_input_files(folder)
    view.get_by_role("button", name="Enrol", exact=True).click()
    expect(view.locator(".report")).to_contain_text("34 images added")
    again = view.get_by_role("row").filter(has_text="gen-c").filter(has_text="Undo")
    again.get_by_role("button", name=re.compile(r"Undo enrolment \d+–\d+")).click()
    expect(page.get_by_role("dialog")).to_contain_text("34 images (gen-c)")
    page.get_by_role("dialog").get_by_role("button", name="Undo it").click()
    expect(again.get_by_role("button")).to_have_count(0)


def test_generated_images_are_not_sent_without_a_generator(opens: Opens) -> None:
    view = opens("generators").locator("#view-generators")
    name = view.get_by_label("Generator", exact=True)
    for given, sent in (("", False), ("  ", False), ("gen-c", True)):
        name.fill(given)
        assert name.evaluate("field => field.form.checkValidity()") is sent


def test_an_enrolment_is_undone_from_the_list_and_clashes_are_told(opens: Opens, image_folder: Path) -> None:
    page = opens("generators")
    view = page.locator("#view-generators")

    def enrol(name: str, *files: Any) -> None:
        view.locator("input[type=file]").first.set_input_files(list(files))
        view.get_by_label("Generator", exact=True).fill(name)
        view.get_by_role("button", name="Enrol", exact=True).click()

    enrol("real", picture(seed=200))
    expect(page.get_by_role("alert")).to_contain_text("'real' cannot name a generator")
    expect(view.get_by_text("Nothing was enrolled")).to_have_count(0)
    enrol("gen-z", image_folder / "fake" / "gen-a" / "000.jpg", image_folder / "real" / "000.jpg")
    expect(view.locator(".report")).to_contain_text("2 images are known as something else")
    enrol("gen-d", picture(seed=201))
    row = view.get_by_role("row").filter(has_text="gen-d").filter(has_text="Undo")
    row.get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Undo it").click()
    expect(view.get_by_role("row").filter(has_text="gen-d").filter(has_text="undone")).to_have_count(1)


def test_a_generator_is_edited_and_deleted_and_a_reference_removed(opens: Opens) -> None:
    page = opens("generators")
    view, dialog = page.locator("#view-generators"), page.get_by_role("dialog")
    view.locator("input[type=file]").first.set_input_files([picture(seed=300), picture(seed=301)])
    view.get_by_label("Generator", exact=True).fill("gen-e")
    view.get_by_role("button", name="Enrol", exact=True).click()
    expect(view.locator(".report")).to_contain_text("2 images added")
    view.get_by_role("button", name="Edit gen-e").click()
    dialog.get_by_label("Vendor").fill(HOSTILE)
    dialog.get_by_label("Family").fill("diffusion")
    dialog.get_by_role("button", name="Save").click()
    row = view.get_by_role("row").filter(has_text="Edit").filter(has_text="gen-e")
    expect(row).to_contain_text(f"gen-e {HOSTILE}, diffusion")
    view.get_by_role("button", name="Edit gen-e").click()
    dialog.get_by_label("Vendor").fill("")
    dialog.get_by_label("Vendor").press("Enter")
    expect(row).to_contain_text("gen-e diffusion")
    page.get_by_role("link", name="Search").click()
    page.locator("#view-search").get_by_label("Generator").select_option("gen-e")
    page.locator("#view-search input[type=file]").set_input_files([picture(seed=300)])
    page.locator(".gallery .portrait").first.click()
    dialog.get_by_role("button", name="Remove").click()
    page.get_by_role("button", name="Remove it").click()
    expect(dialog).to_contain_text("Removed from the reference set.")
    dialog.get_by_role("button", name="Close").click()
    page.get_by_role("link", name="Generators", exact=True).click()
    expect(row.get_by_role("cell").first).to_have_text("1")  # the table that is read anew replaces the one before
    view.get_by_role("button", name="Delete gen-e").click()
    expect(dialog).to_contain_text("1 reference image of it will be removed")
    dialog.get_by_role("button", name="Cancel").click()
    view.get_by_role("button", name="Delete gen-e").click()
    dialog.get_by_role("button", name="Delete it").click()
    expect(row).to_have_count(0)
    view.get_by_role("button", name="Edit gen-b").click()
    page.route("**/v1/generators/*", problem("forbidden", 403, "Not allowed"))
    dialog.get_by_role("button", name="Save").click()
    expect(view.get_by_role("alert")).to_contain_text("Not allowed")


def test_enrolments_by_command_and_values_measured_once(opens: Opens) -> None:
    page = opens()
    recall = [{"generator": "gen-a", "images": 3, "knn": {"before": None, "after": 0.3333}}]
    report = {
        "added": 3,
        "generators": {"gen-a": 3},
        "sources": {"folder": 2, "other": 1},
        "effect": {"recall": recall},
    }
    row = {
        "id": 1,
        "at": "2026-01-01T00:00:00Z",
        "generator": "gen-a",
        "source": None,
        "references": 3,
        "report": report,
    }
    page.route("**/v1/enrolments*", fulfilled(json.dumps({"enrolments": [row], "next": None})))
    page.get_by_role("link", name="Generators", exact=True).click()
    enrolment = page.get_by_role("row").filter(has_text="Undo").filter(has_text="gen-a")
    expect(enrolment).to_contain_text("folder, other")
    expect(enrolment).to_contain_text("1 of 3 (33 %) after")
    assert "33\N{NO-BREAK SPACE}%" in enrolment.inner_text()
    headings = page.locator("#view-generators thead").all_inner_texts()
    assert headings
    assert not any("before" in heading for heading in headings)


def test_every_view_says_what_is_out_of_order(opens: Opens) -> None:
    page = opens()
    notice = page.locator("#service-notice")
    expect(page.locator(".known")).to_contain_text("gen-a")
    expect(notice).to_be_empty()
    status = page.request.get(page.url.split("#")[0] + "v1/status").json()
    reason = "tiny (c1) judges while large (c2) is the active checkpoint: LINEUP_CHECKPOINT names the other"
    page.route("**/v1/status", fulfilled(json.dumps(status | {"degraded": True, "inactive": reason})))
    for view in ("Search", "Generators", "Status", "Detect"):
        page.get_by_role("link", name=view, exact=True).click()
        expect(notice).to_have_text(
            f"The database is away or slow. Lineup judges from memory, and records nothing. {reason}."
        )
    page.unroute("**/v1/status")
    page.get_by_role("link", name="Status").click()
    expect(notice).to_be_empty()


def test_enrolments_are_undone_together_only_where_this_page_sent_them_so(opens: Opens) -> None:
    page = opens()
    report = {"added": 3, "generators": {"gen-a": 3}}
    rows = [
        {"id": number, "at": f"2026-01-01T00:00:0{number}Z", "generator": "gen-a", "source": "feed"}
        | {"references": 3, "report": report}
        for number in (2, 1)
    ]
    page.route("**/v1/enrolments*", fulfilled(json.dumps({"enrolments": rows, "next": None})))
    page.get_by_role("link", name="Generators", exact=True).click()
    for number in (1, 2):
        expect(page.get_by_role("button", name=f"Undo enrolment {number}", exact=True)).to_have_count(1)


# Status


def test_status_shows_what_answers_and_how_well_calibrated(opens: Opens) -> None:
    page = opens()
    judge(page, picture("lately.png", seed=7))
    page.get_by_role("link", name="Status").click()
    view = page.locator("#view-status")
    expect(view.locator(".cards")).to_contain_text("60 real photos and 60 generated images")
    expect(view.locator(".cards")).to_contain_text("up to date with the database")
    expect(view.locator("section", has_text="Calibration")).to_contain_text("under 9 sources say nothing of a new one")
    expect(view.locator(".plot")).to_have_count(2)
    view.locator("summary").first.click()
    cells = view.get_by_role("table", name="Scores of the calibration images").locator("td").all_inner_texts()
    assert sum(int(cell) for cell in cells) == 150  # 120 of the checkpoint, 30 of the generator that it lacks
    expect(view.get_by_role("link", name="lately.png").first).to_be_visible()
    expect(view.get_by_role("button", name="Refresh")).to_be_enabled()


# Discover


@pytest.fixture
def unexplained(populated: ServiceSettings) -> Iterator[None]:
    """Eight kept verdicts on images that are alike and unlike all references, the first of which has a thumbnail."""
    store = Store(connect(populated))
    [checkpoint] = store.checkpoints.list()
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "JPEG")
    result = {"verdict": "uncertain", "image": {"format": "PNG", "shortfall": None}}
    vectors = np.eye(checkpoint.dim, dtype=np.float32)[0] + np.random.default_rng(0).normal(
        scale=0.02, size=(8, checkpoint.dim)
    )
    store.detections.add(
        [
            Detection(
                *(uuid.uuid4(), sha256(f"judged {n}".encode()).hexdigest(), 9, 64, 48, vector.astype(np.float32)),
                result | {"file": f"{HOSTILE} {n}.png"},
                *(checkpoint.id, None, 1),
                thumbnail=None if n else picture.getvalue(),
            )
            for n, vector in enumerate(vectors)
        ]
    )
    yield
    with store.engine.begin() as connection:
        connection.execute(text("delete from detection where result->>'file' like '<img%'"))
    store.engine.dispose()


def test_a_group_of_unexplained_images_is_enrolled_and_undone(opens: Opens, unexplained: None) -> None:
    page = opens("candidates", axe=True)
    group = page.locator(".candidate").filter(has_text=HOSTILE)
    expect(group.get_by_role("heading", level=2)).to_contain_text("8 images")
    expect(group).to_contain_text("cannot tell 8")
    expect(group).to_contain_text("of calibration images lie as far off")
    expect(group.locator(".judged li")).to_have_count(8)
    alike(group.locator(".judged img"))
    expect(group.locator(".judged img")).to_have_count(1)
    group.get_by_text("The references nearest to them").click()
    expect(group.locator(".suspect").first).to_contain_text("alike")
    assert violations(page) == []
    field = group.get_by_label("Made by the generator")
    field.fill("real")
    field.press("Enter")
    expect(group.get_by_role("alert")).to_contain_text("real")
    field.fill("gen-found")
    group.get_by_role("button", name="Enrol these images").click()
    expect(group).to_contain_text("Enrolled: gen-found")
    expect(group).to_contain_text("8 images added")
    expect(field).to_be_hidden()
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    group.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo it").click()
    expect(group).to_contain_text("Undone: 8 references removed.")
    expect(field).to_be_visible()
    page.route("**/v1/candidates", problem("not-installed", 501, "A library is not installed"))
    page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Discover").click()
    expect(page.locator("#view-candidates").get_by_role("alert")).to_contain_text("A library is not installed")
    page.request.delete(f"{page.url.split('#')[0]}v1/generators/gen-found")


def test_images_without_a_thumbnail_are_shown_where_this_tab_has_them(opens: Opens) -> None:
    page = opens()
    page.get_by_label("Also score regions").uncheck()
    record = judge(page, picture("mine.png", seed=71)).get_by_role("link", name="Record").get_attribute("href") or ""
    image = {"file": "mine.png", "verdict": "uncertain", "thumbnail": None, "nearest": None}
    group = {"name": "a1", "images": 2, "first": "2026-01-01T00:00:00Z", "last": "2026-01-01T00:00:00Z"}
    group |= {"novelty": None, "similarity": None, "verdicts": {"uncertain": 2}, "nearest": []}
    mine, path = image | {"detection": record.rpartition("/")[2]}, "/v1/detections/kept/thumbnail"
    group["examples"] = [mine, mine | {"thumbnail": path}, image | {"detection": "other"}]
    page.route(f"**{path}", lambda route: route.fulfill(body=picture()["buffer"], content_type="image/png"))
    body = {"candidates": [group], "images": 2, "ungrouped": 0, "left_out": 0}
    page.route("**/v1/candidates", fulfilled(json.dumps(body)))
    page.get_by_role("link", name="Discover").click()
    images = page.locator(".judged img")
    expect(images).to_have_count(2)
    alike(images)
    assert len({shown.get_attribute("src") for shown in images.all()}) == 2
    page.route("**/v1/candidates", fulfilled(json.dumps(body | {"candidates": [], "ungrouped": 2})))
    page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Discover").click()
    expect(page.locator(".candidates")).to_contain_text(f"at least {SMALLEST} that are alike")


# Access


@pytest.fixture
def locked(populated: ServiceSettings) -> Iterator[tuple[str, str]]:
    """The address of a service that asks for a key, and one for detecting."""
    store, secret = Store(connect(populated)), new_secret()
    store.keys.create("reader", hash_secret(secret), ["detect"])
    try:
        with served(populated) as url:
            yield url, secret
    finally:
        with store.engine.begin() as connection:
            connection.exec_driver_sql("delete from api_key")
        store.engine.dispose()


def test_a_key_is_asked_for_kept_in_the_session_and_forgotten(opens: Opens, locked: tuple[str, str]) -> None:
    url, secret = locked
    page = opens(url=url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This service asks for a key")
    dialog.get_by_label("API key").fill("lineup_wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("the token of the start ends with the first key. Enter another one.")
    dialog.get_by_label("API key").fill(secret)
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    alike(judge(page).locator(".suspect img"))  # fetched with the key
    assert secret not in json.dumps(page.context.storage_state())  # neither cookie nor local storage
    page.get_by_role("link", name="Status").click()
    alert = page.locator("#view-status").get_by_role("alert")
    expect(alert).to_contain_text("this key needs the scope admin")
    page.reload()
    expect(page.locator("#view-status .cards")).to_be_visible()
    page.get_by_role("button", name="Forget it").click()
    page.get_by_role("button", name="Refresh").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#view-status").get_by_role("alert").first).to_contain_text("An API key or the token is needed")


def test_the_link_that_was_printed_opens_the_page_and_its_token_leaves_the_address(
    opens: Opens, populated: ServiceSettings
) -> None:
    with served(populated, open=False) as url:
        asking = opens("status", url=url)
        expect(asking.get_by_role("dialog")).to_contain_text("prints a link that opens this page")
        page = opens("status", url=f"{url}?token={populated.token}")
        expect(page.locator("#view-status .cards")).to_be_visible()
        assert page.url == f"{url}#/status"
        page.reload()
        expect(page.locator("#view-status .cards")).to_be_visible()
        assert populated.token not in json.dumps(page.context.storage_state())


# Errors


def test_files_that_cannot_be_judged_are_named_with_the_reason(opens: Opens) -> None:
    page = opens()
    cut_off = picture(size=200)["buffer"][:2000]
    cases = {
        "empty.png": (b"", "The image cannot be read"),
        "cut-off.png": (cut_off, "The image cannot be read"),
        "words.png": (b"some words", "Not an image of an accepted format"),
        "huge.png": (huge(), "Too large"),
    }
    choose(page, *(other_file(name, data) for name, (data, _) in cases.items()))
    for name, (_, title) in cases.items():
        failed = page.locator(".failed", has_text=name)
        expect(failed.get_by_role("alert").locator(".title")).to_have_text(title)
    expect(page.locator(".failed", has_text="huge.png")).to_contain_text("LINEUP_MAX_PIXELS")
    expect(page.locator(".tally")).to_have_text("4 failed")


def problem(kind: str, status: int, title: str, **headers: str) -> Callable[[Route], None]:
    """An answer that is not to be had from a healthy service."""
    body = {"type": f"urn:lineup:{kind}", "title": title, "status": status, "detail": HOSTILE, "request_id": "4f6c"}
    return lambda route: route.fulfill(
        status=status, headers={"content-type": "application/problem+json", **headers}, body=json.dumps(body)
    )


PROBLEMS: dict[str, Callable[[Route], None]] = {
    "may work again in 7 s": problem("too-many-requests", 429, "Too many requests", **{"retry-after": "7"}),
    "its database is away": problem("not-ready", 503, "Not ready"),
    "Request 4f6c": problem("internal", 500, "The server failed"),
    "A field is not valid": problem("bad-field", 422, "A field is not valid"),
    "Ask whoever runs the service": problem("forbidden", 403, "Not allowed"),
    "answered 502": lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"),
    "The service does not answer": lambda route: route.abort(),
}


def test_what_goes_wrong_is_said_in_words_and_can_be_tried_again(opens: Opens) -> None:
    page = opens()
    alert = page.get_by_role("alert")
    for words, answer in PROBLEMS.items():
        page.route("**/v1/detect*", answer)
        choose(page, picture(seed=8))
        expect(alert).to_contain_text(words)
        page.unroute("**/v1/detect*")
        if words != "The service does not answer":
            page.get_by_role("button", name="Clear").click()
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".verdict")).to_be_visible()
    expect(alert).to_have_count(0)


def test_views_say_what_is_wrong(opens: Opens) -> None:
    page = opens("record/6a9791ba-7c7e-4df6-b283-a32e64590fc8")
    expect(page.get_by_role("alert")).to_contain_text("there is no detection 6a9791ba")
    page.goto(page.url.split("#")[0] + "#/record/nonsense")
    expect(page.get_by_role("alert")).to_contain_text("A field is not valid")
    page.route("**/v1/**", problem("not-ready", 503, "Not ready"))
    for view in ("generators", "status"):
        page.get_by_role("link", name=view.title(), exact=True).click()
        expect(page.locator(f"#view-{view}").get_by_role("alert").first).to_contain_text("Not ready")
    page.get_by_role("link", name="Search").click()
    page.locator("#view-search input[type=file]").set_input_files([picture()])
    expect(page.locator("#view-search").get_by_role("alert")).to_contain_text("Not ready")


def test_a_service_that_is_starting_is_waited_for(opens: Opens) -> None:
    page = opens()
    ready = problem("not-ready", 503, "Not ready")
    page.route("**/health/ready", ready)
    page.reload()
    expect(page.locator("#service-notice")).to_contain_text("The service is not ready")
    page.unroute("**/health/ready")
    expect(page.locator("#view-detect")).to_be_visible()
    expect(page.locator("#service-notice")).to_be_empty()


# Hostile input


def test_names_and_metadata_are_only_text(opens: Opens) -> None:
    page = opens()
    name = f"{HOSTILE.replace('/', '')}\u202egnp.exe"
    seen = name.replace("\u202e", "?")
    verdict = judge(page, picture(name, seed=9, texts={"parameters": HOSTILE, "Software": HOSTILE}))
    expect(verdict.locator(".of")).to_have_text(seen)
    expect(verdict.locator(".provenance td").filter(has_text=HOSTILE)).to_have_count(2)
    page.get_by_role("link", name="Status").click()
    expect(page.get_by_role("link", name=seen)).to_be_visible()
    page.get_by_role("link", name="Detect", exact=True).click()
    choose(page, other_file(name, b"no image"))
    expect(page.get_by_role("alert")).to_contain_text("Not an image")


def test_the_page_is_files_without_inline_code_markup_from_text_or_other_hosts() -> None:
    # Links that people follow lead to the hub; nothing is loaded from there.
    addresses = re.compile(
        r"https?://(?!www\.w3\.org/2000/svg|huggingface\.co/)[\w\[$]"
    )  # a field may show how one begins
    for file in FILES.iterdir():
        text = file.read_text()
        assert not addresses.search(text), file.name
        if file.suffix == ".js":
            for forbidden in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "localStorage",
            ):
                assert forbidden not in text, (file.name, forbidden)
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", text)


# Accessibility


def violations(page: Page) -> list[str]:
    """What axe finds, as one line each."""
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 380)])
def test_axe_finds_nothing_and_nothing_overflows(opens: Opens, scheme: str, width: int) -> None:
    page = opens(color_scheme=scheme, width=width, reduced_motion="reduce", axe=True)
    expect(page.locator("#view-detect")).to_be_visible()
    assert violations(page) == []
    verdict = judge(page, picture(seed=10, texts={"parameters": "a castle"}))
    choose(page, other_file("notes.txt", b"words"))
    expect(page.get_by_role("alert")).to_be_visible()
    verdict.get_by_role("button", name="This is wrong").click()
    assert violations(page) == []
    verdict.locator(".portrait").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("SHA-256")
    assert violations(page) == []
    page.keyboard.press("Escape")
    for view, shown in (
        ("search", ".filters"),
        ("references", ".gallery"),
        ("generators", "table"),
        ("status", ".plot"),
    ):
        page.get_by_role("link", name=view.title(), exact=True).click()
        expect(page.locator(f"#view-{view} {shown}").first).to_be_visible()
        if view == "search":
            page.locator("#view-search input[type=file]").set_input_files([picture()])
            expect(page.locator(".gallery")).to_be_visible()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("link", name="Detect", exact=True).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_is_enough(opens: Opens) -> None:
    page = opens()
    expect(page.locator("#view-detect")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Tab")
    chooser = page.locator("#view-detect input[type=file]").first
    expect(chooser).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineStyle") == "solid"
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Generators", exact=True)).to_be_focused()
    navigation = page.get_by_role("navigation", name="Main").get_by_role("link")
    places = [link.bounding_box() for link in navigation.all()]
    page.keyboard.press("Enter")
    expect(page.locator("#title-generators")).to_be_focused()
    assert [link.bounding_box() for link in navigation.all()] == places
    expect(page.get_by_role("link", name="Generators", exact=True)).to_have_attribute("aria-current", "page")
    expect(page).to_have_title("Generators · Lineup")
    for view in VIEWS:
        expect(page.locator(f"#view-{view}")).to_be_visible(visible=view == "generators")
