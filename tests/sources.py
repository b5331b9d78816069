"""What tests of sources share: a local web server, and whether two sources give the same."""

import functools
import http.server
import threading
from contextlib import contextmanager

import numpy as np


@contextmanager
def served(handler, folder):
    """The address at which a server of this process answers for a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def same(one, other) -> None:
    """Two data sets have the same classes, names, labels and bytes."""
    assert one.classes == other.classes
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert a.names == b.names
        assert np.array_equal(a.labels, b.labels)
        assert [a.read(index) for index in range(len(a))] == [b.read(index) for index in range(len(b))]
