import contextlib
import copy
import dataclasses
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.decode import generate
from switchlm.generation.sampling import GREEDY
from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.serving.api import create_app
from switchlm.serving.engine import Engine
from switchlm.serving.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


@pytest.fixture(scope="session")
def model():
    """A nano model whose output is varied and has no end token."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        preset("nano"), initialisation=Initialisation(scale=4.0), tied_head=False
    )
    model = SwitchTransformer(config).eval()
    with torch.no_grad():
        model.head.weight[config.end_id] = 0.0
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.bytes()


@pytest.fixture
def alone(model):
    """Generate the tokens of a prompt alone, with a copy of the model for this thread."""
    own = copy.deepcopy(model)

    def alone(ids, limit, sampling=GREEDY, seed=0):
        inputs_BS = torch.tensor([ids])
        done = generate(own, inputs_BS, max_new_tokens=limit, sampling=sampling, seeds=seed)
        return done.tokens_BT[0].tolist()

    return alone


@pytest.fixture
def engine(model, tokenizer):
    """Start an engine; all are closed at the end."""
    engines = []

    def start(**options):
        options = {"num_slots": 4, "max_source": 64, "max_target": 64, "queue": 16, **options}
        engines.append(Engine(model, tokenizer, **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for one in engines:
        one.close(30)


class Collector:
    """A listener that collects events."""

    def __init__(self):
        self.events, self.done, self.began = [], threading.Event(), threading.Event()

    def __call__(self, event):
        self.events.append(event)
        self.began.set()
        if event.reason is not None:
            self.done.set()

    def end(self):
        """Wait for the end; return the tokens and the reason."""
        assert self.done.wait(60), "no end came"
        tokens = [event.token for event in self.events if event.token is not None]
        return tokens, self.events[-1].reason


@pytest.fixture
def collector():
    return Collector


@dataclasses.dataclass
class Served:
    """A running server; address: without a slash at the end; run: what the server ends with."""

    address: str
    engine: Engine
    run: Future[None]

    def metrics(self):
        """Return the values of /metrics by name with labels."""
        text = httpx.get(f"{self.address}/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@pytest.fixture
def serve(engine):
    """Serve a started engine on a free loopback port, in a thread.

    seconds: for a request; interface: of create_app; limits: of Connections; others: of the engine.
    """
    with contextlib.ExitStack() as stack:

        def start(*, seconds=60.0, limits=None, interface=None, **options):
            running = engine(**options)
            app = create_app(running, name="nano", seconds=seconds, **(interface or {}))
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            server = Server(app, listener, running, seconds=seconds, **(limits or {}))
            threads = ThreadPoolExecutor(1)
            run = threads.submit(server.run)

            def stop():
                server.stop()
                run.exception(30)
                threads.shutdown()

            stack.callback(stop)
            while not server.started:
                time.sleep(0.01)
            return Served(f"http://127.0.0.1:{listener.getsockname()[1]}", running, run)

        yield start


@pytest.fixture
def soon():
    """Wait until a condition is true, for some seconds."""

    def soon(condition, seconds=10.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not become true"
            time.sleep(0.005)

    return soon


@pytest.fixture(scope="module")
def browser():
    """A browser; tests that need it are skipped without one."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = pytest.importorskip("tests.serving.screenshot").ARGUMENTS
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open an address; check at the end for requests to other origins, and for errors."""
    contexts, complaints, requests = [], [], []

    def visit(address, expected=(), **settings):
        context = browser.new_context(**settings)
        contexts.append((context, address, expected))
        page = context.new_page()
        page.set_default_timeout(60_000)  # the machine may be busy
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and not any(text in message.text for text in expected)
                and complaints.append(message.text)
            ),
        )
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context, _, _ in contexts:
        context.close()
    assert not complaints
    origins = tuple(address.split("#")[0] for _, address, _ in contexts)
    assert requests
    assert not [one for one in requests if not one.startswith((*origins, "data:", "about:"))]
