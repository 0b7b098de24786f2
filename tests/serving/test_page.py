"""The page in a browser, with a server and a model of nano size."""

import dataclasses
import json
import shutil
import socket
import threading
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.answer import put_into_blanks
from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.report.write import ReportRun, write_report
from switchlm.serving.engine import Engine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium to open the page in")
pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn runs the server")
api = pytest.importorskip("switchlm.serving.api", reason="fastapi is missing")
screenshot = pytest.importorskip("tests.serving.screenshot")
TEXT = "def <extra_id_0>(self):\n\treturn <extra_id_1> # größe"
KEY = "a key of the test"


def nano():
    """A model whose output is varied, with two Switch layers per stack and a tight capacity."""
    torch.manual_seed(3)
    shape = {"initialisation": Initialisation(scale=4.0), "num_encoder_layers": 4}
    config = dataclasses.replace(preset("nano"), **shape, num_decoder_layers=4)
    router = dataclasses.replace(config.router, evaluation_capacity_factor=0.5)
    return SwitchTransformer(dataclasses.replace(config, router=router)).eval()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "report.html"
    lines = [{"step": step, "loss": 5.0 / step, "tokens_per_second": 9} for step in (1, 2, 3)]
    write_report(path, title="a run", headline="It ran.", runs=[ReportRun(name="a", metrics=lines)])
    return path.read_text("utf-8")


@contextmanager
def serving(report, key=None):
    """Serve the nano model in a thread; yield the address."""
    engine = Engine(nano(), Tokenizer.bytes(), num_slots=2, max_source=256, max_target=256, queue=8)
    engine.start()
    app = api.create_app(engine, name="nano", key=key, report=report)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture(scope="module")
def url(report):
    with serving(report) as address:
        yield address


def ask(url, path, **body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.loads(response.read())


WATCH = """window.seen = [];
new MutationObserver(() => seen.push(document.getElementById("result").textContent))
  .observe(document.getElementById("result"), {childList: true});"""


def fill(page, text=TEXT):
    page.evaluate("document.getElementById('max-tokens').value = 12")
    page.fill("#text", text)
    page.click("#submit")
    page.wait_for_selector("#stacks figure")


def colours(page, stack=0):
    return page.locator(".tokens").nth(stack).evaluate(
        "box => [...box.children].map(token => getComputedStyle(token).backgroundColor)"
    )  # fmt: skip


def test_a_text_is_filled_and_its_tokens_are_coloured_by_expert(visit, url):
    page = visit(url)
    fill(page)
    options = {"temperature": 0, "top_p": 1, "seed": 0, "max_tokens": 12}
    filled = ask(url, "v1/fill", text=TEXT, **options)
    assert page.locator("#result").inner_text() == filled["filled"]
    assert page.locator("#result mark").count() == 2
    routed = ask(url, "v1/route", text=TEXT, output=filled["output"])
    for place, name in enumerate(("encoder", "decoder")):
        layer = routed[name]["layers"][0]
        found = colours(page, place)
        assert len(found) == len(routed[name]["tokens"])
        hues = page.locator(".tokens").nth(place).evaluate(
            "box => [...box.children].map(token => token.style.getPropertyValue('--hue'))"
        )  # fmt: skip
        assert len(set(zip(layer["expert"], hues, strict=True))) == len(set(layer["expert"]))
        assert len(set(hues)) == len(set(layer["expert"])) > 1
        loads = page.locator(".loads").nth(place).locator(".count").all_inner_texts()
        assert [int(load or 0) for load in loads] == layer["load"]


def test_the_layer_slider_changes_the_colours_of_its_stack_only(visit, url):
    page = visit(url)
    fill(page)
    encoder, decoder = colours(page, 0), colours(page, 1)
    page.focus("#encoder-layer")
    page.keyboard.press("ArrowRight")
    assert page.locator("#encoder-layer").get_attribute("aria-valuetext") == "2 of 2: block 4"
    assert colours(page, 0) != encoder
    assert colours(page, 1) == decoder
    page.keyboard.press("ArrowLeft")
    assert colours(page, 0) == encoder


def test_everything_works_by_keyboard(visit, url):
    page = visit(url)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.press("Control+A")
    page.keyboard.type("x = ")
    for _ in range(2):  # the button that inserts the next blank comes after the one that submits
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.input_value("#text") == "x = <extra_id_0>"
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stacks figure")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    page.keyboard.press("ArrowRight")
    focused = page.locator(".token:focus")
    assert focused.inner_text() == " "
    assert focused.evaluate("token => getComputedStyle(token).outlineStyle") == "solid"
    label = focused.get_attribute("aria-label")
    assert label.startswith("“␣”: expert ")
    popover = page.locator(".popover").first
    assert label.split(": ")[1] in popover.inner_text()
    page.keyboard.press("ArrowUp")  # the layer above
    assert page.input_value("#encoder-layer") == "1"
    assert focused.get_attribute("aria-label").split(": ")[1] in popover.inner_text()
    page.keyboard.press("Escape")
    assert popover.is_hidden()


# Blends the colours, as the browser does, and compares their luminance.
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = colours => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => node ? [...behind(node.parentElement), getComputedStyle(node).backgroundColor] : [];
  return [...document.querySelectorAll(".token:not(.dropped), .note, h1, small, button, label, summary, output, mark")]
    .filter(node => node.textContent.trim() && node.checkVisibility()).map(node => {
      const under = luminance(behind(node)), over = luminance([...behind(node), getComputedStyle(node).color]);
      return [(Math.max(under, over) + .05) / (Math.min(under, over) + .05), node.outerHTML.slice(0, 90)];
    });
}"""  # noqa: E501


@pytest.mark.parametrize(("scheme", "light"), [("light", True), ("dark", False)])
def test_light_and_dark_are_readable(visit, url, scheme, light):
    page = visit(url, color_scheme=scheme)
    fill(page)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 380) == light
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert min(contrasts)[0] >= 4.5, min(contrasts)


@pytest.fixture(scope="module")
def url_with_key(report):
    with serving(report, KEY) as address:  # until after the page, which may ask for more
        yield address


def test_the_key_is_requested_and_kept_in_memory_only(visit, url_with_key):
    page = visit(url_with_key, expected=("401",))
    page.wait_for_selector("#key:focus")
    assert "API key" in page.inner_text("#error")
    page.keyboard.type("wrong")  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#key:focus")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#model:not(:empty)")
    assert page.locator("#error").is_hidden()
    fill(page)
    page.click("text=Report of the run")
    assert page.frame_locator("#report").locator("h1").inner_text() == "a run"
    kept = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(kept) == [0, 0, ""]
    assert KEY not in page.content()
    page.reload()
    page.wait_for_selector("#key-form:not([hidden])")


def test_the_server_s_errors_are_shown_as_text(visit, url):
    page = visit(url, expected=("400",))
    page.fill("#text", "<extra_id_100>")
    page.click("#submit")
    page.wait_for_selector("#error:not([hidden])")
    assert "has only <extra_id_0> to <extra_id_99>" in page.inner_text("#error")
    page.fill("#text", " ")
    page.click("#submit")
    assert "Type a text first" in page.inner_text("#error")
    fill(page)
    assert page.locator("#error").is_hidden()


def test_failed_requests_have_messages(visit, url):
    page = visit(url, expected=("ERR_FAILED", "429"))
    busy = {"error": {"message": "The queue is full.", "type": "busy", "param": None, "code": None}}
    stumble = 'data: {"output": "<extra_id_0>a"}\n\ndata: {"error": {"message": "It broke."}}\n\n'
    for answer, message in (
        ({}, "The server does not respond. Is it still running?"),
        (
            {"status": 429, "json": busy, "headers": {"Retry-After": "7"}},
            "The queue is full. Try again in 7 s.",
        ),
        ({"content_type": "text/event-stream", "body": stumble}, "It broke."),
    ):
        page.unroute("**/v1/fill")
        page.route(
            "**/v1/fill",
            lambda route, _, answer=answer: route.fulfill(**answer) if answer else route.abort(),
        )
        page.click("#submit")
        page.wait_for_selector("#submit:not([disabled])")
        assert page.inner_text("#error") == message
    page.unroute("**/v1/fill")
    fill(page)
    assert page.locator("#error").is_hidden()


def test_stop_ends_a_request_that_takes_long(visit, url):
    page = visit(url)
    page.route("**/v1/fill", lambda route: None)  # never responds
    page.fill("#text", TEXT)
    page.click("#submit")
    page.click("#stop")
    page.wait_for_selector("#submit:not([disabled])")
    assert page.inner_text("#status") == "Stopped."
    assert page.locator("#stop").is_hidden()
    assert page.locator("#error").is_hidden()


def test_blanks_are_filled_while_the_output_is_generated(visit, url):
    page = visit(url)
    output = "<extra_id_0>size<extra_id_1>1"
    last = {"output": output, "filled": "", "finished": True, "spans": {"0": "size", "1": "1"}}
    events = [*({"output": output[:end]} for end in range(len(output))), last]
    body = "".join(f"data: {event}\n\n" for event in [*map(json.dumps, events), "[DONE]"])
    page.route(
        "**/v1/fill", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    page.evaluate(WATCH)
    fill(page, "f<extra_id_0>(<extra_id_1>)")
    seen = page.evaluate("seen")
    assert seen[-1] == "fsize(1)"
    for part in ("fs(<extra_id_1>)", "fsiz(<extra_id_1>)", "fsize(1)"):
        assert part in seen
    assert "Done in" in page.inner_text("#status")


def test_responses_are_never_inserted_as_html(visit, url):
    page = visit(url)
    evil = "<img src=x onerror='document.title=1'>"
    page.route("**/v1/fill", lambda route: route.fulfill(
        content_type="text/event-stream",
        body="data: " + json.dumps({"output": f"<extra_id_0>{evil}", "filled": "", "finished": True,
                                    "spans": {"0": evil}}) + "\n\ndata: [DONE]\n\n",
    ))  # fmt: skip
    fill(page, f"{evil}<extra_id_0>")
    assert page.inner_text("#result") == put_into_blanks(f"{evil}<extra_id_0>", {0: evil})
    assert page.locator("#result img, #stacks img").count() == 0
    assert evil in page.locator(".tokens").nth(1).inner_text()


def test_the_report_of_the_run_is_a_view_with_an_address(visit, url):
    page = visit(url + "#report")
    report = page.frame_locator("#report")
    assert report.locator("h1").inner_text() == "a run"
    assert report.locator("svg").count() >= 1  # its scripts run
    assert page.locator("#text-view").is_hidden()
    page.click("text=Expert assignment")
    page.wait_for_selector("#text-view")  # visible, once the address has changed
    assert page.locator("nav [aria-current]").inner_text() == "Expert assignment"


def test_capacity_shows_the_dropped_tokens(visit, url):
    page = visit(url)
    fill(page)
    assert page.locator(".token.dropped").count() == 0
    page.check("#capacity")
    page.wait_for_selector(".token.dropped")
    text = page.locator("#stacks figcaption").first.inner_text()
    dropped = page.locator(".tokens").first.locator(".dropped").count()
    assert f"{dropped} dropped" in text


def test_a_bar_shows_the_tokens_of_its_expert_only(visit, url):
    page = visit(url)
    fill(page)
    bar = page.locator(".loads").first.locator("button").filter(has_text="1").first
    bar.click()
    tokens = page.locator(".tokens").first
    load = int(bar.locator(".count").inner_text())
    assert tokens.locator(".picked").count() == load
    assert (
        tokens.evaluate("box => getComputedStyle(box.querySelector(':not(.picked)')).opacity") < "1"
    )
    bar.click()
    assert tokens.locator(".picked").count() == 0


def routed_by(experts, tokens=120):
    """The routing of a layer with many experts, of which about forty are used."""
    expert = [
        place * place * 7 % min(experts, 41) * (experts // min(experts, 41))
        for place in range(tokens)
    ]
    load = [expert.count(one) for one in range(experts)]
    layer = {"layer": 1, "part": "feedforward", "expert": expert, "gate": [0.5] * tokens,
             "kept": [True] * tokens, "load": load}  # fmt: skip
    stack = {"tokens": ["ab"] * tokens, "layers": [layer]}
    return {"model": "m", "num_experts": experts, "encoder": stack, "decoder": stack}


@pytest.mark.parametrize(("experts", "bars"), [(2, 2), (64, 64), (2048, 32)])
def test_few_and_many_experts(visit, url, experts, bars):
    page = visit(url, viewport={"width": 390, "height": 800})
    page.route("**/v1/route", lambda route: route.fulfill(json=routed_by(experts)))
    fill(page)
    drawn = page.locator(".loads").first.locator("button")
    assert drawn.count() <= bars
    assert drawn.count() >= min(bars, 20)
    assert f"of {experts:,} experts used" in page.locator("figcaption").first.inner_text()
    busiest = drawn.evaluate_all(
        "bars => bars.slice(0, 8).map(b => b.style.getPropertyValue('--hue'))"
    )
    assert len(set(busiest)) == min(8, bars)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_dense_model_and_a_text_without_blanks(visit, url):
    page = visit(url)
    dense = {"tokens": ["a", "</s>"], "layers": []}
    answer = {"model": "m", "num_experts": 0, "encoder": dense, "decoder": dense}
    page.route("**/v1/route", lambda route: route.fulfill(json=answer))
    page.evaluate(WATCH)
    fill(page, "translate: a")
    assert len(set(page.evaluate("seen"))) > 3  # shown while it is generated
    assert page.inner_text("#result-title") == "Answer"
    assert page.inner_text("#result")
    assert "dense" in page.inner_text("#routing-note")
    assert page.locator(".loads").count() == 0
    assert page.locator("#capacity-row").is_hidden()


def test_the_picture_for_the_docs_shows_a_token_s_expert(visit, url):
    page = visit(url)
    screenshot.pose(page, TEXT, layer=1, token=4)
    assert page.input_value("#encoder-layer") == page.input_value("#decoder-layer") == "1"
    assert "expert" in page.locator(".popover").first.inner_text()
    assert page.screenshot().startswith(b"\x89PNG")


def test_motion_is_reduced_on_request(visit, url):
    page = visit(url, reduced_motion="reduce")
    fill(page)
    page.locator(".token").first.hover()
    popover = page.locator(".popover").first
    assert popover.is_visible()
    assert popover.evaluate("node => getComputedStyle(node).animationName") == "none"
