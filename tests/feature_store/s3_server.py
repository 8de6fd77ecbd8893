"""A real S3 server for the tests: moto's, one request at a time, so that its conditional PUT is atomic.

moto looks whether an object is there and puts it in two steps; two requests at once may both find nothing. Behind one
lock there is no "at once", as there is none in a service that promises it.

    python -m tests.feature_store.s3_server      prints its port and serves until it is killed
"""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


def one_at_a_time(app: Callable[[Any, Any], Iterable[bytes]]) -> Callable[[Any, Any], list[bytes]]:
    """The same application behind one lock."""
    lock = threading.Lock()

    def locked(environ: Any, start_response: Any) -> list[bytes]:
        with lock:
            return [b"".join(app(environ, start_response))]

    return locked


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, one_at_a_time(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()
