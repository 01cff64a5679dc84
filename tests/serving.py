"""A server in a thread of the tests' process, and what its tests share."""

import io
import socket
import threading
import time
from functools import partial

import httpx
import openai
import uvicorn

from latentdiff.server.app import application
from latentdiff.server.guard import LOOPBACK
from latentdiff.server.shelf import Shelf
from latentdiff.server.studio import RUNS, Studio

PROMPT = "a red circle above a blue square"
# a request would load the certificates of all authorities, and the servers here speak plain HTTP
get, post, stream = (partial(each, verify=False) for each in (httpx.get, httpx.post, httpx.stream))


class Served:
    """A server in a thread of this process, at a free port."""

    def __init__(self, pipe, folder, hosts=LOOPBACK, token=None, limits=None, most_waiting=40, shelf=None, runs=RUNS):
        self.studio = Studio(shelf or Shelf(pipe, lambda *_: pipe), folder, most_waiting, runs)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(application(self.studio, hosts, token, limits), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._http = httpx.Client(verify=False)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)

    def __enter__(self):
        self.studio.worker.start()
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.studio.worker.stop()
        self._server.should_exit = True
        self._thread.join(20)
        self._http.close()

    def client(self, **more):
        more |= {"api_key": "not used", "max_retries": 0, "http_client": self._http}
        return openai.OpenAI(base_url=f"{self.address}/v1", **more)

    def post(self, path, body=None, **more):
        return post(self.address + path, json=body, timeout=60, **more)


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
