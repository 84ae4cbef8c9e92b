"""`python -m sutrain.monitor.textfile OUTPUT_DIR/metrics.prom`: serves that one file to Prometheus.

Data preparation writes its numbers to a file, because it may be a job without an address. Where node exporter runs, its
textfile collector reads the file; elsewhere this serves it, and nothing beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, path: Path, *arguments: object) -> None:
        self._file = path
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path != "/metrics":
            return self.send_error(404, "only /metrics is here")
        try:
            content = self._file.read_bytes()
        except OSError as error:
            return self.send_error(503, f"cannot read the file: {error.strerror}")
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """A line for every scrape is no news."""


def server_of(path: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the file; `serve_forever` runs it. Port 0 takes any free one."""
    return ThreadingHTTPServer((host, port), partial(_Handler, path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sutrain.monitor.textfile", description=__doc__)
    parser.add_argument("file", type=Path, help="metrics.prom of a data preparation's output folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=9701, help="default: 9701, as in prometheus.yml")
    options = parser.parse_args(arguments)
    if options.file.is_dir():
        print(
            f"error: {options.file} is a folder; give the file, {options.file / 'metrics.prom'}",
            file=sys.stderr,
        )
        return 2
    try:
        server = server_of(options.file, options.host, options.port)
    except OSError as error:
        print(f"error: cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"http://{options.host}:{server.server_port}/metrics", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
