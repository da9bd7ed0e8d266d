"""A Google Cloud Storage of this machine: an HTTP server on the loopback interface that speaks the JSON API.

The clients are the real ones (gcsfs, google-cloud-storage, TensorStore's and ArrayRecord's own); the buckets are a
dictionary. Not kept to: permissions, quotas, retries after errors, and how long anything takes.
"""

import base64
import contextlib
import email
import hashlib
import json
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# gcsfs reads it when it is imported: whether to ask another service, by gRPC, what kind of bucket each is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

BUCKET = "bucket"
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/?]+)")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")


class Store:
    """The objects: (bucket, name) -> bytes."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.generations: dict[tuple[str, str], int] = {}
        self.uploads: dict[str, tuple[tuple[str, str], bytearray]] = {}
        self.lock = threading.Lock()
        self.count = 0
        self.url = ""

    def put(self, key: tuple[str, str], data: bytes) -> None:
        with self.lock:
            self.count += 1
            self.objects[key], self.generations[key] = bytes(data), self.count

    def remove(self, key: tuple[str, str]) -> bool:
        with self.lock:
            self.generations.pop(key, None)
            return self.objects.pop(key, None) is not None

    def names(self, folder: str = "") -> list[str]:
        """Of the objects under a folder of the bucket."""
        with self.lock:
            return sorted(name for bucket, name in self.objects if bucket == BUCKET and name.startswith(folder))

    def metadata(self, key: tuple[str, str]) -> dict[str, str]:
        data, generation = self.objects[key], str(self.generations[key])
        moment = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "id": f"{key[0]}/{key[1]}/{generation}", "name": key[1], "bucket": key[0],
            "generation": generation, "metageneration": "1", "size": str(len(data)), "storageClass": "STANDARD",
            "contentType": "application/octet-stream", "timeCreated": moment, "updated": moment, "etag": generation,
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, value: object, code: int = 200, **headers: str) -> None:
        self.answer(code, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def missing(self) -> None:
        self.json({"error": {"code": 404, "message": "Not Found"}}, 404)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, True).items()}

    def key(self) -> tuple[str, str] | None:
        found = OBJECT.fullmatch(urlsplit(self.path).path)
        if found:
            return unquote(found[1]), unquote(found[2])
        # ArrayRecord's client reads by the XML API: /bucket/object.
        bucket, _, name = urlsplit(self.path).path.lstrip("/").partition("/")
        return (unquote(bucket), unquote(name)) if bucket not in ("storage", "upload", "batch") and name else None

    def do_HEAD(self) -> None:
        key = self.key()
        self.answer(200 if key in self.store.objects else 404)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/computeMetadata") or path == "/":
            return self.answer(404)
        if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
            return self.listing(unquote(path.split("/")[4]))
        if re.fullmatch(r"/storage/v1/b/[^/]+", path):
            bucket = unquote(path.split("/")[4])
            return self.json({"kind": "storage#bucket", "name": bucket}) if bucket == BUCKET else self.missing()
        key = self.key()
        if key is None or key not in self.store.objects:
            return self.missing()
        is_media = self.query.get("alt") == "media" or not path.startswith("/storage")
        return self.media(key) if is_media else self.json(self.store.metadata(key))

    def media(self, key: tuple[str, str]) -> None:
        data = self.store.objects[key]
        headers = {
            "Content_Type": "application/octet-stream",
            "x_goog_generation": str(self.store.generations[key]),
            "ETag": str(self.store.generations[key]),
        }
        if self.query.get("ifGenerationNotMatch") == headers["x_goog_generation"]:
            return self.answer(304)
        if self.query.get("ifGenerationMatch", headers["x_goog_generation"]) != headers["x_goog_generation"]:
            return self.answer(412)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, data, **headers)
        if not wanted[1]:
            first, last = max(0, len(data) - int(wanted[2])), len(data)
        else:
            first, last = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(data)
        if first >= len(data):
            return self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
        part = data[first:last]
        return self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", **headers)

    def listing(self, bucket: str) -> None:
        if bucket != BUCKET:
            return self.missing()
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset", "\U0010ffff")
        items, folders = [], set()
        for name in self.store.names(prefix):
            rest = name[len(prefix) :]
            if not start <= name < end:
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            elif (bucket, name) in self.store.objects:
                items.append(self.store.metadata((bucket, name)))
        return self.json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        if "upload_id" in self.query:
            return self.do_PUT()
        body = self.body()
        if path.startswith("/batch"):
            return self.batch(body)
        if found := COPY.fullmatch(path):
            source, target = (unquote(found[1]), unquote(found[2])), (unquote(found[3]), unquote(found[4]))
            if source not in self.store.objects:
                return self.missing()
            self.store.put(target, self.store.objects[source])
            size = str(len(self.store.objects[target]))
            return self.json({
                "kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size,
                "resource": self.store.metadata(target),
            })  # fmt: skip
        bucket = unquote(path.split("/")[5])
        if bucket != BUCKET:
            return self.missing()
        kind, name = self.query.get("uploadType"), self.query.get("name")
        data = body
        if kind == "multipart":
            message = email.message_from_bytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
            )
            described, content = message.get_payload()
            name = json.loads(described.get_payload(decode=True)).get("name", name)
            data = content.get_payload(decode=True)
        elif kind == "resumable":
            name = (json.loads(body) if body else {}).get("name", name)
            number = uuid.uuid4().hex
            self.store.uploads[number] = ((bucket, name), bytearray())
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self.json({}, 200, Location=place)
        wanted = self.query.get("ifGenerationMatch")
        if wanted is not None and wanted != str(self.store.generations.get((bucket, name), 0)):
            return self.json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        self.store.put((bucket, name), data)
        return self.json(self.store.metadata((bucket, name)))

    def do_PUT(self) -> None:
        key, data = self.store.uploads[self.query["upload_id"]]
        data += self.body()
        if re.fullmatch(r"bytes (\d+-\d+|\*)/\*", self.headers.get("Content-Range", "")):
            return self.answer(308, b"", Range=f"bytes=0-{len(data) - 1}")
        self.store.put(key, bytes(data))
        return self.json(self.store.metadata(key))

    def do_DELETE(self) -> None:
        key = self.key()
        return self.answer(204) if key is not None and self.store.remove(key) else self.missing()

    def batch(self, body: bytes) -> None:
        """Only deletions come so."""
        boundary = "answers"
        parts = []
        for number, found in enumerate(re.findall(rb"DELETE (\S+) ", body)):
            name = OBJECT.search(urlsplit(found.decode()).path)
            assert name is not None
            code = "204 No Content" if self.store.remove((unquote(name[1]), unquote(name[2]))) else "404 Not Found"
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {code}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(parts) + f"--{boundary}--\r\n"
        self.answer(200, text.encode(), Content_Type=f"multipart/mixed; boundary={boundary}")


class Server(ThreadingHTTPServer):
    """A client that has had enough of an answer is no error."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def served() -> Iterator[Store]:
    """A store that is served until the end of the block; `environment` leads clients there."""
    store = Store()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(store: Store) -> dict[str, str]:
    """What leads gcsfs and google-cloud-storage, TensorStore, and ArrayRecord's client to the store."""
    return {
        "STORAGE_EMULATOR_HOST": store.url,
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "TENSORSTORE_GCS_HTTP_VERSION": "1",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": store.url,
        "CLOUD_STORAGE_TESTBENCH_ENDPOINT": store.url,
        "GOOGLE_CLOUD_PROJECT": "test",
    }
