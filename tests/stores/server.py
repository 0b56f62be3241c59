"""A real S3 server on this machine, moto's, with faults in front of it that a test can ask for."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# What a request is answered with instead: a status, or None for what the server says. It may take its time.
Fault = Callable[[str, str], int | None]
BUCKET = "bucket"


class Server:
    """Answers on a port of its own.

    Attributes:
        asked: method and path of every request.
        address: where.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._fault: Fault | None = None
        self.asked: list[tuple[str, str]] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Where clients find it, and a name and a password that it does not look at."""
        return {
            "AWS_ENDPOINT_URL": self.address, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing-secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def _answer(self, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append(request)
        if self._fault is not None and (status := self._fault(*request)):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Injected", [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start_response)

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Ask for faults in a block."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = None

    def close(self) -> None:
        self._server.shutdown()
