"""A small Hugging Face Hub on loopback: downloads, uploads and everything that goes wrong on the way.

    with Hub() as hub:
        hub.add('org/name', {'config.json': b'{}', 'model.safetensors': weights})
        hub.fault('/cdn/', cut=1000)        # the next answer below /cdn/ ends after 1000 bytes

Files of weights lie on another origin (`/cdn/`), as at the real Hub, with their SHA-256 as ETag; other files are
answered in place, with git's blob id. Repositories have commits, `main`, and the tags that a test gives them.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ('.safetensors', '.pth', '.bin', '.tar')
TOKEN = 'hf_loopbackSecretToken'


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit on `main` that holds these files, and return its hash."""
        content = repr([len(self.commits), sorted((name, sha256(data)) for name, data in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs['main'] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """What `main` holds."""
        return self.commits[self.refs['main']]

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do wrong to the next `times` requests whose path contains `path`.

    Attributes:
        status: answer with this status.
        cut: close the connection after so many bytes of the body.
        delay: wait so many seconds first.
        flip: change the byte at this place of the body.
        short: leave out the last bytes and announce only what is sent.
    """

    path: str
    times: int = 1
    method: str = ''
    status: int = 0
    cut: int = -1
    delay: float = 0.0
    flip: int = -1
    short: int = 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Hub:
    """The server and what it holds; a context manager.

    Attributes:
        requests: (method, path, headers) of every request so far.
        uploads: number of large files that were sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.uploads = 0
        handler = type('Handler', (_Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'
        self.cdn = f'http://localhost:{self.server.server_port}/cdn'

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to a repository, made where there is none, and return the commit's hash."""
        repository = self.repositories.setdefault(name, Repository(private))
        self.objects.update((sha256(data), data) for file, data in files.items() if file.endswith(LARGE))
        return repository.commit(files)

    def fault(self, path: str, **what) -> None:
        self.faults.append(Fault(path, **what))

    def seen(self, method: str, part: str) -> list[dict[str, str]]:
        """Headers of the requests with this method whose path contains `part`."""
        return [headers for verb, path, headers in self.requests if verb == method and part in path]

    def next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.path in path and fault.method in ('', method):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fault = self.hub.next_fault(self.command, path) or Fault('')
        self.hub.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        length = self.headers.get('Content-Length')
        self.body = self.rfile.read(int(length)) if length else self._chunks()
        threading.Event().wait(self.fault.delay)
        if self.fault.status:
            return self.send(self.fault.status, b'{"error": "on purpose"}')
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, **match.groupdict())
        self.send(404, b'{"error": "no such route"}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _chunks(self) -> bytes:
        """A body in chunks, such as that of an upload."""
        body = b''
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            while size := int(self.rfile.readline().strip() or b'0', 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def send(self, status: int, body: bytes = b'', **headers: str) -> None:
        fault, partial = self.fault, status in (200, 206) and self.command == 'GET'
        if partial and fault.flip >= 0:
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 1]) + body[fault.flip + 1 :]
        if partial and fault.short:
            body = body[: -fault.short]
        self.send_response(status)
        headers.setdefault('Content_Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        if status >= 400:
            self.send_header('Connection', 'close')
        self.end_headers()
        if self.command != 'HEAD':
            cut = partial and fault.cut >= 0
            self.wfile.write(body[: fault.cut] if cut else body)
            self.close_connection = self.close_connection or cut

    def send_json(self, content, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), Content_Type='application/json')

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.send(status, json.dumps({'error': code}).encode(), X_Error_Code=code, X_Error_Message=code, **headers)

    def known(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def repository(self, name: str) -> Repository | None:
        """The repository, or None after an answer that it is not for this user: the Hub does not tell which."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.known()):
            self.refuse(404 if self.known() else 401, 'RepoNotFound')
            return None
        return repository

    # Downloads

    def file(self, name: str, revision: str, file: str) -> None:
        if (repository := self.repository(name)) is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            return self.refuse(404, 'RevisionNotFound')
        data = repository.commits[sha].get(file)
        if data is None:
            return self.refuse(404, 'EntryNotFound', X_Repo_Commit=sha)
        if not file.endswith(LARGE):
            return self.send(200, data, ETag=f'"{blob_id(data)}"', X_Repo_Commit=sha)
        digest, size = sha256(data), str(len(data))
        location = {'Location': f'{self.hub.cdn}/{digest}', 'X_Linked_Etag': f'"{digest}"', 'X_Linked_Size': size}
        return self.send(302, b'', X_Repo_Commit=sha, **location)

    def large(self, digest: str) -> None:
        data = self.hub.objects[digest]
        start = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if not start:
            return self.send(200, data, Accept_Ranges='bytes')
        first = int(start[1])
        return self.send(206, data[first:], Content_Range=f'bytes {first}-{len(data) - 1}/{len(data)}')

    def info(self, name: str, revision: str | None = None) -> None:
        if (repository := self.repository(name)) is None:
            return None
        siblings = [{'rfilename': file} for file in repository.files]
        sha = repository.resolve(revision or 'main')
        return self.send_json({'id': name, 'sha': sha, 'private': repository.private, 'siblings': siblings})

    def paths_info(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return None
        form = parse_qs(self.body.decode())
        wanted, files = form.get('paths', []), repository.commits[repository.resolve(revision) or '']
        entries = []
        for file in wanted if wanted else files:
            if file in files:
                data = files[file]
                lfs = {'lfs': {'size': len(data), 'oid': sha256(data), 'sha256': sha256(data), 'pointerSize': 127}}
                entry = {'type': 'file', 'path': file, 'size': len(data), 'oid': blob_id(data)}
                entries.append({**entry, **(lfs if file.endswith(LARGE) else {})})
        return self.send_json(entries)

    # Uploads

    def whoami(self) -> None:
        self.send_json({'name': 'org', 'type': 'user'}) if self.known() else self.refuse(401, 'Unauthorized')

    def create(self) -> None:
        if not self.known():
            return self.refuse(401, 'Unauthorized')
        wanted = json.loads(self.body)
        name = f'{wanted.get("organization") or "org"}/{wanted["name"]}'
        url = {'url': f'{self.hub.endpoint}/{name}', 'name': name}
        if name in self.hub.repositories:
            return self.send_json({**url, 'error': 'You already created this model repo'}, 409)
        private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({})
        return self.send_json(url)

    def validate_yaml(self) -> None:
        self.send_json({'errors': [], 'warnings': []})

    def preupload(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return None
        if not self.known():
            return self.refuse(401, 'Unauthorized')
        answers = []
        for wanted in json.loads(self.body)['files']:
            file, large = wanted['path'], wanted['path'].endswith(LARGE)
            there = repository.files.get(file)
            oid = None if there is None else sha256(there) if large else blob_id(there)
            answers.append(
                {'path': file, 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False, 'oid': oid}
            )
        return self.send_json({'files': answers})

    def batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)['objects']:
            upload = {'upload': {'href': f'{self.hub.endpoint}/lfs/{wanted["oid"]}'}}
            objects.append({**wanted, **({} if wanted['oid'] in self.hub.objects else {'actions': upload})})
        self.send_json({'objects': objects, 'transfer': 'basic'})

    def put(self, digest: str) -> None:
        if sha256(self.body) != digest:
            return self.send_json({'error': 'checksum'}, 400)
        self.hub.objects[digest] = self.body
        self.hub.uploads += 1
        return self.send(200)

    def commit(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return None
        files = dict(repository.files)
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
            elif item['key'] == 'deletedFile':
                files.pop(value['path'])
        sha = repository.commit(files)
        return self.send_json({'commitUrl': f'{self.hub.endpoint}/{name}/commit/{sha}', 'commitOid': sha})


_NAME, _REVISION = r'(?P<name>[\w.-]+/[\w.-]+)', r'(?P<revision>[^/]+)'
_ROUTES = [
    (('GET', 'HEAD'), rf'/{_NAME}/resolve/{_REVISION}/(?P<file>.+)', _Handler.file),
    (('GET', 'HEAD'), r'/cdn/(?P<digest>[0-9a-f]{64})', _Handler.large),
    (('GET',), r'/api/whoami-v2', _Handler.whoami),
    (('POST',), r'/api/repos/create', _Handler.create),
    (('POST',), r'/api/validate-yaml', _Handler.validate_yaml),
    (('POST',), rf'/api/models/{_NAME}/preupload/{_REVISION}', _Handler.preupload),
    (('POST',), rf'/api/models/{_NAME}/commit/{_REVISION}', _Handler.commit),
    (('POST',), rf'/api/models/{_NAME}/paths-info/{_REVISION}', _Handler.paths_info),
    (('GET',), rf'/api/models/{_NAME}(/revision/{_REVISION})?', _Handler.info),
    (('POST',), rf'/{_NAME}\.git/info/lfs/objects/batch', _Handler.batch),
    (('PUT',), r'/lfs/(?P<digest>[0-9a-f]{64})', _Handler.put),
]
