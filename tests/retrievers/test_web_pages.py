"""PageReader: what is read of a page, and what a page must not be able to do. All pages are on the loopback, under names that a resolver of the test knows."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
import zlib
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import SearchRequest, extraction_worker, web_pages
from searchqa_retrievers.online import Online
from searchqa_retrievers.readable_text import UnreadablePage, decode, plain_text, text_of_html
from searchqa_retrievers.web_pages import PageFailed, PageReader, is_public

SENTENCES = "The Vistula is the longest river in Poland. It flows from the Beskids to the Baltic Sea, past Kraków and Warsaw. " * 4
PAGE = (
    "<!DOCTYPE html><html><head><title>Vistula</title><style>p {color: red}</style></head><body><nav><a href='/'>Home</a></nav>"
    f"<article><h1>Vistula</h1><p>{SENTENCES}</p></article><script>alert('no text')</script><footer>Imprint</footer></body></html>"
)


def html(body=PAGE, status=200, **headers):
    body = body.encode() if isinstance(body, str) else body
    return status, {"Content-Type": "text/html; charset=utf-8", **{name.replace("_", "-"): value for name, value in headers.items()}}, body


PLAIN = (200, {"Content-Type": "text/plain"}, b"The Vistula is a river.")
"""Read without an HTML parser, where a test is not about one."""


class Site:
    """A web server that answers paths with what ``pages`` has: status, headers, and a body or a function that writes one."""

    def __init__(self, host="127.0.0.1", family=socket.AF_INET):
        self.pages = {"/page": PLAIN}
        self.asked = []
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_GET(self):
                outer.asked.append((self.path, dict(self.headers.items())))
                status, headers, body = outer.pages.get(self.path, (404, {}, b"nothing"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if callable(body):
                    self.end_headers()
                    try:
                        body(self.wfile)
                    except OSError:
                        outer.stop.set()
                    return
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            address_family = family
            daemon_threads = True

            def handle_error(self, *arguments):
                pass  # readers that hang up are what is tested

        self.server = Server((host, 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def paths(self):
        return [path for path, _ in self.asked]

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def sites():
    made = []

    def start(**options):
        made.append(Site(**options))
        return made[-1]

    yield start
    for site in made:
        site.close()


@pytest.fixture
def site(sites):
    return sites()


async def to_loopback(host, port):
    return ["127.0.0.1"]


def read(*urls, allow_hosts=("pages.test",), resolve=to_loopback, together=True, **options):
    """The texts of the pages and what was counted."""
    counters = defaultdict(float)

    async def work():
        reader = PageReader(
            **(
                {
                    "user_agent": "searchqa-gym/1",
                    "timeout": 5.0,
                    "most_bytes": 200_000,
                    "most_characters": 35_000,
                    "parallel": 8,
                }
                | options
            ),
            allow_hosts=allow_hosts,
            counters=counters,
            resolve=resolve,
        )
        try:
            if together:
                return await asyncio.gather(*map(reader.read, urls))
            return [await reader.read(url) for url in urls]
        finally:
            await reader.close()

    texts = asyncio.run(work())
    return (texts[0] if len(urls) == 1 else texts), {
        key.removeprefix("page_"): value for key, value in counters.items() if key != "page_seconds"
    }


def url_of(site, path="/page", host="pages.test"):
    return f"http://{host}:{site.port}{path}"


# -- Text --------------------------------------------------------------------------------------------------------------------------------------


def test_the_text_for_people_is_read(site):
    site.pages["/page"] = html()
    text, counted = read(url_of(site))
    assert text == "Vistula\n" + SENTENCES.strip()
    assert counted == {"fetches": 1}


def test_a_page_says_who_asks_and_for_which_host(site):
    read(url_of(site))
    assert site.paths == ["/robots.txt", "/page"]
    for _, headers in site.asked:
        assert headers["User-Agent"] == "searchqa-gym/1"
        assert headers["Host"] == f"pages.test:{site.port}"
        assert headers["Accept-Encoding"] == "gzip"


def test_plain_text_is_read_as_it_is(site):
    site.pages["/page"] = (200, {"Content-Type": "text/plain"}, b"One  line\r\n\r\n<b>two</b>\x00\n")
    site.pages["/page"] = (200, {"Content-Type": "text/plain"}, b"One  line\r\n\r\n<b>two</b>\x07\n")
    assert read(url_of(site))[0] == "One line\n<b>two</b>"


def test_the_text_is_cut(site):
    assert read(url_of(site), most_characters=11)[0] == "The Vistula"


@pytest.mark.parametrize(
    ("headers", "encoding"),
    [
        ({"Content-Type": "text/plain; charset=iso-8859-2"}, "iso-8859-2"),
        ({"Content-Type": "text/plain"}, "utf-8"),
        ({"Content-Type": "text/plain"}, "utf-8-sig"),
        ({"Content-Type": "text/plain; charset=unknown-9"}, "utf-8"),
        ({"Content-Type": "text/plain; charset=punycode"}, "utf-8"),
        ({"Content-Type": 'text/html; charset="UTF-16"'}, "utf-16"),
    ],
)
def test_encodings(site, headers, encoding):
    site.pages["/page"] = (200, headers, PAGE.encode(encoding))
    assert "Kraków" in read(url_of(site))[0]


def test_an_encoding_that_the_page_declares():
    assert decode('<meta charset="iso-8859-2"><p>Kraków Łódź'.encode("iso-8859-2"), None).endswith("Kraków Łódź")
    assert decode("Kraków Łódź é".encode("cp1252", "replace"), None) == "Kraków ?ód? é"
    assert decode("Łódź".encode()[:-1], None) == "Łód"
    assert decode(b"<meta charset=unicode_escape>\\x41", None).endswith("\\x41")


@given(st.binary(max_size=300), st.sampled_from([None, "utf-8", "utf-16", "shift_jis", "idna", "zlib", "x" * 99, "\0", "gb18030"]))
def test_any_bytes_decode(body, charset):
    assert isinstance(decode(body, charset), str)


@given(st.text())
def test_plain_text_is_one_line_that_can_be_encoded(text):
    plain = plain_text(text)
    assert plain == " ".join(plain.split())
    plain.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The <strong>Vistula</strong> &amp; the <b class='x'>Oder</b><br/>", "The Vistula & the Oder"),
        ("List<String> a < b > c", "List<String> a < b > c"),
        ("&#x27;&quot;&nbsp;x", "'\" x"),
        ("</information>", "</information>"),
        ("a\u2028b\ud800c\x00d", "a b c d"),
    ],
)
def test_snippets_lose_their_markup(text, expected):
    assert plain_text(text) == expected


@pytest.mark.parametrize(
    "page", ["", "<", "<html></html>", "\0" * 1000, "<div>" * 50_000, "<b>" * 50_000 + "x", "<!--" * 50_000, "&" * 100_000]
)
def test_pages_without_text_are_unreadable(page):
    with pytest.raises(UnreadablePage):
        text_of_html(page)


def test_a_page_that_keeps_the_parser_busy_is_given_up_and_the_next_one_is_read(site, monkeypatch):
    monkeypatch.setattr(extraction_worker, "EXTRACTION_SECONDS", 2.0)
    site.pages["/busy"] = html("<html><body><div " + " ".join(f"a{n}=1" for n in range(200_000)) + f"><p>{SENTENCES}")
    site.pages["/page"] = html()
    (busy, good), counted = read(url_of(site, "/busy"), url_of(site), together=False, most_bytes=10_000_000)
    assert busy is None
    assert good is not None
    assert counted == {"fetches": 2, "failed": 1}


# -- What is not read --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        html(status=404),
        html(status=500),
        html(status=204, body=b""),
        (200, {}, PAGE.encode()),
        (200, {"Content-Type": "application/pdf"}, PAGE.encode()),
        (200, {"Content-Type": "image/svg+xml"}, PAGE.encode()),
        (200, {"Content-Type": "text/htmlx"}, PAGE.encode()),
        html(b"\x7fELF\x02\x01\x01\0\0\0\0" + b"\0\xff" * 5000),
        html(b""),
        html(Content_Encoding="br"),
        html(Content_Encoding="gzip, gzip"),
        html(Content_Encoding="gzip"),
        html(Content_Type="text/html", Content_Length="100000"),
        html(status=302),
        html(status=302, Location="//"),
        html(status=302, Location="http://[::bad/"),
        html(status=302, Location="/page"),
        html(status=301, Location="\x7f\x80"),
    ],
    ids=range(18),
)
def test_a_page_that_is_none_is_dropped(site, page):
    site.pages["/page"] = page
    text, counted = read(url_of(site), timeout=2.0)
    assert text is None
    assert counted.get("failed", 0) + counted.get("refused", 0) == 1


def test_redirects_are_followed_within_the_limit(site):
    site.pages["/0"] = html(status=307, Location="1", body=b"")
    for number in range(1, 10):
        site.pages[f"/{number}"] = html(status=302, Location=f"http://pages.test:{site.port}/{number + 1}", body=b"")
    site.pages["/5"] = PLAIN
    assert read(url_of(site, "/0"))[0] is not None
    site.pages["/6"] = PLAIN
    site.pages["/5"] = html(status=302, Location="/6", body=b"")
    text, counted = read(url_of(site, "/0"))
    assert (text, counted["failed"]) == (None, 1)


def test_a_huge_page_is_read_up_to_the_limit(site):
    site.pages["/page"] = html(f"<html><body><p>{SENTENCES}</p>" + "<p>filler filler filler</p>" * 100_000)
    text, _ = read(url_of(site), most_bytes=5000)
    assert text.startswith("The Vistula")
    assert len(text) < 5000


def test_an_endless_page_is_read_up_to_the_limit(site):
    def endless(file):
        file.write(f"<html><body><p>{SENTENCES}</p>".encode())
        while not site.stop.is_set():
            file.write(b"5\r\n<p>x \r\n" * 100)

    site.pages["/page"] = (200, {"Content-Type": "text/html"}, endless)
    text, _ = read(url_of(site), most_bytes=50_000)
    assert text.startswith("The Vistula")
    assert site.stop.wait(10)  # it was hung up on


def test_a_page_that_drips_is_given_up(site):
    def drip(file):
        while not site.stop.is_set():
            file.write(b"x")
            file.flush()
            site.stop.wait(0.02)

    site.pages["/page"] = (200, {"Content-Type": "text/html"}, drip)
    text, counted = read(url_of(site), timeout=0.5)
    assert (text, counted["failed"]) == (None, 1)
    assert site.stop.wait(10)


def test_headers_without_end_are_given_up(sites):
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    while True:
                        connection.sendall(b"X-Filler: " + b"y" * 1000 + b"\r\n")
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        text, counted = read(f"http://pages.test:{listener.getsockname()[1]}/page", timeout=5.0)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert (text, counted["failed"]) == (None, 1)


def test_compressed_pages_are_unpacked(site):
    site.pages["/page"] = (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(SENTENCES.encode()))
    assert read(url_of(site))[0] == SENTENCES.strip()


def test_a_compression_bomb_is_not_unpacked(site, monkeypatch):
    packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    bomb = packer.compress(SENTENCES.encode())
    for _ in range(60):
        bomb += packer.compress(b"\0" * 2**20)
    bomb += packer.flush()
    assert len(bomb) < 80_000
    unpacked = []

    class Watched:
        def __init__(self, wbits):
            self._inner = zlib.decompressobj(wbits)

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def decompress(self, part, most):
            unpacked.append(self._inner.decompress(part, most))
            return unpacked[-1]

    class Library:
        error, MAX_WBITS, decompressobj = zlib.error, zlib.MAX_WBITS, Watched

    (real, web_pages.zlib) = (web_pages.zlib, Library)
    try:
        site.pages["/page"] = (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, bomb)
        read(url_of(site), most_bytes=50_000)
    finally:
        web_pages.zlib = real
    assert sum(map(len, unpacked)) == 50_000


# -- Where it must not go ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::ffff:0:7f00:1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%eth0",
        "fec0::1",
        "ff02::1",
        "5f00::1",
        "nonsense",
        "127.1",
        "0x7f000001",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "100.63.255.255",
        "100.128.0.1",
        "172.15.255.255",
        "172.32.0.1",
        "2606:4700::1111",
        "2a00:1450::1",
        "64:ff9b::808:808",
    ],
)
def test_public_addresses(address):
    assert is_public(address)


FORBIDDEN = [
    "http://127.0.0.1/page",
    "http://localhost/page",
    "http://127.1/page",
    "http://2130706433/page",
    "http://0x7f000001/page",
    "http://[::1]/page",
    "http://[::ffff:127.0.0.1]/page",
    "http://0.0.0.0/page",
    "http://127.0.0.1:{port}/page",
    "http://localhost:{port}/page",
    "https://localhost/",
    "http://[::1]:{port}/page",
    "http://169.254.169.254/latest/meta-data/",
    "http://inside.test/page",
    "http://inside.test:{port}/page",
    "http://inside6.test/page",
    "http://mixed.test/page",
    "http://pages.test:{port}@127.0.0.1:{port}/page",
    "http://pages.test@inside.test/page",
    "ftp://pages.test/page",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_GET",
    "data:text/html,hello",
    "http://public.test:22/",
    "http://public.test:{port}/",
]


async def of_forbidden(host, port):
    known = {
        "pages.test": ["127.0.0.1"],
        "inside.test": ["127.0.0.1"],
        "inside6.test": ["::ffff:10.0.0.1"],
        "mixed.test": ["93.184.216.34", "127.0.0.1"],
        "public.test": ["93.184.216.34"],
    }
    return known[host] if host in known else await web_pages.resolve(host, port)


@pytest.mark.parametrize("url", FORBIDDEN)
def test_forbidden_addresses_are_not_asked(site, sites, url):
    secret = sites()
    text, counted = read(url.format(port=secret.port), resolve=of_forbidden)
    assert (text, counted) == (None, {"refused": 1})
    assert secret.asked == []


@pytest.mark.parametrize("url", FORBIDDEN)
def test_redirects_to_forbidden_addresses_are_not_followed(site, sites, url):
    secret = sites()
    site.pages["/page"] = html(status=302, Location=url.format(port=secret.port), body=b"")
    text, counted = read(url_of(site), resolve=of_forbidden)
    assert (text, counted) == (None, {"fetches": 1, "refused": 1})
    assert secret.asked == []


def test_a_robots_txt_cannot_lead_to_a_forbidden_address_either(site, sites):
    secret = sites()
    site.pages["/robots.txt"] = html(status=302, Location=f"http://127.0.0.1:{secret.port}/robots.txt", body=b"")
    assert read(url_of(site)) == (None, {"refused": 1})
    assert secret.asked == []


def test_a_name_that_changes_its_address_between_look_ups_gains_nothing(site, monkeypatch):
    """DNS rebinding: the check and the connection must not be two look-ups."""
    looked_up, connected = [], []

    async def rebinding(host, port):
        looked_up.append(host)
        return ["93.184.216.34"] if len(looked_up) == 1 else ["127.0.0.1"]

    import httpcore2

    class Network(httpcore2.AnyIOBackend):
        async def connect_tcp(self, host, port, *arguments, **options):
            connected.append(host)
            raise httpcore2.ConnectError("no network in this test")

    monkeypatch.setattr(httpcore2, "AnyIOBackend", Network)
    text, counted = read("http://rebinding.test/page", resolve=rebinding, allow_hosts=())
    assert (text, counted) == (None, {"failed": 1})
    assert connected == ["93.184.216.34"]
    assert looked_up == ["rebinding.test"]

    text, counted = read("http://rebinding.test/page", resolve=rebinding, allow_hosts=())
    assert (text, counted) == (None, {"refused": 1})
    assert connected == ["93.184.216.34"]


def test_the_certificate_must_be_of_the_host_of_the_page(monkeypatch):
    """The socket goes to the checked address, the name in the handshake stays that of the page."""
    import httpcore2

    seen = []

    class Stream(httpcore2.AsyncMockStream):
        async def start_tls(self, ssl_context, server_hostname=None, timeout=None):
            seen.append((server_hostname, ssl_context.check_hostname, ssl_context.verify_mode.name))
            raise httpcore2.ConnectError("no certificate in this test")

    class Network(httpcore2.AnyIOBackend):
        async def connect_tcp(self, host, port, *arguments, **options):
            seen.append((host, port))
            return Stream([])

    async def public(host, port):
        return ["93.184.216.34"]

    monkeypatch.setattr(httpcore2, "AnyIOBackend", Network)
    assert read("https://secure.test/page", resolve=public, allow_hosts=()) == (None, {"failed": 1})
    assert seen == [("93.184.216.34", 443), ("secure.test", True, "CERT_REQUIRED")]


def test_a_host_without_address_is_a_failure():
    async def nowhere(host, port):
        raise PageFailed(f"{host} has no address")

    assert read("http://nowhere.test/", resolve=nowhere) == (None, {"failed": 1})


def test_the_next_address_is_tried_where_one_does_not_answer(site):
    async def several(host, port):
        return ["127.0.0.2", "127.0.0.1"]

    assert read(url_of(site), resolve=several)[0] is not None


def test_an_allowed_host_and_port_allows_that_port_only(site, sites):
    other = sites()
    (first, second), _ = read(
        url_of(site, host="127.0.0.1"), url_of(other, host="127.0.0.1"), allow_hosts=[f"127.0.0.1:{site.port}"], resolve=web_pages.resolve
    )
    assert first is not None
    assert second is None
    assert other.asked == []


# -- robots.txt --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("robots", "allowed"),
    [
        ("User-agent: *\nDisallow: /page", False),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: searchqa-gym\nDisallow: /\n\nUser-agent: *\nDisallow:", False),
        ("User-agent: otherbot\nDisallow: /", True),
        ("User-agent: *\nDisallow: /private", True),
        ("User-agent: *\nAllow: /page\nDisallow: /", True),
        ("", True),
        ("<html>not a robots.txt</html>", True),
        ("\ufeffUser-agent: *\r\nDisallow: /page\r\n", False),
    ],
)
def test_robots_txt_is_obeyed(site, robots, allowed):
    site.pages["/robots.txt"] = (200, {"Content-Type": "text/plain"}, robots.encode())
    text, counted = read(url_of(site))
    assert (text is not None) == allowed
    assert counted == ({"fetches": 1} if allowed else {"robots_refused": 1})
    assert site.paths == (["/robots.txt", "/page"] if allowed else ["/robots.txt"])


@pytest.mark.parametrize(
    ("status", "allowed"), [(404, True), (410, True), (401, True), (403, True), (429, False), (500, False), (503, False)]
)
def test_a_robots_txt_that_is_not_there_allows_and_one_that_cannot_be_given_forbids(site, status, allowed):
    site.pages["/robots.txt"] = (status, {}, b"User-agent: *\nDisallow: /")
    text, counted = read(url_of(site))
    assert (text is not None) == allowed
    assert counted == ({"fetches": 1} if allowed else {"robots_refused": 1})


def test_a_robots_txt_that_is_not_reached_forbids(site):
    def hang(file):
        site.stop.wait(10)

    site.pages["/robots.txt"] = (200, {}, hang)
    text, counted = read(url_of(site), timeout=0.4)
    assert (text, counted) == (None, {"failed": 1})
    assert site.paths == ["/robots.txt"]


def test_only_the_first_part_of_a_long_robots_txt_counts(site):
    site.pages["/robots.txt"] = (200, {}, b"#" * web_pages.MOST_ROBOTS_BYTES + b"\nUser-agent: *\nDisallow: /")
    assert read(url_of(site))[0] is not None


def test_robots_txt_of_each_host_on_the_way_is_obeyed(site, sites):
    other = sites()
    other.pages["/robots.txt"] = (200, {}, b"User-agent: *\nDisallow: /")
    site.pages["/page"] = html(status=302, Location=f"http://other.test:{other.port}/page", body=b"")
    text, counted = read(url_of(site), allow_hosts=["pages.test", "other.test"])
    assert (text, counted) == (None, {"fetches": 1, "robots_refused": 1})
    assert other.paths == ["/robots.txt"]


# -- Together ----------------------------------------------------------------------------------------------------------------------------------


def test_a_page_and_a_robots_txt_are_fetched_once(site):
    site.pages["/other"] = PLAIN
    texts, counted = read(url_of(site), url_of(site), url_of(site, "/other"), url_of(site))
    assert texts[0] == texts[1] == texts[3]
    assert counted == {"fetches": 2}
    assert sorted(site.paths) == ["/other", "/page", "/robots.txt"]
    read(url_of(site), url_of(site), together=False)
    assert site.paths.count("/page") == 2


def test_a_failure_is_not_remembered(site):
    site.pages["/page"] = html(status=500)
    first, counted = read(url_of(site), url_of(site), together=False)
    assert (first, counted) == ([None, None], {"fetches": 2, "failed": 2})


def test_a_host_is_asked_for_few_pages_at_once(site):
    most = together = 0
    lock = threading.Lock()

    def body(file):
        nonlocal most, together
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.05)
        with lock:
            together -= 1
        file.write(b"text")

    paths = [f"/{number}" for number in range(12)]
    site.pages |= dict.fromkeys(paths, (200, {"Content-Type": "text/plain"}, body))
    texts, _ = read(*(url_of(site, path) for path in paths), parallel=12)
    assert None not in texts
    assert most <= web_pages.PARALLEL_PER_HOST


# -- In the retriever --------------------------------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_had_leaves_the_snippet(site, sites, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret")
    secret = sites()
    results = [
        {"title": "Good", "link": url_of(site), "snippet": "snippet 1"},
        {"title": "Gone", "link": url_of(site, "/gone"), "snippet": "snippet 2"},
        {"title": "Inside", "link": f"http://127.0.0.1:{secret.port}/page", "snippet": "snippet 3"},
        {"title": "Neither", "link": url_of(site, "/neither")},
        {"title": "Forbidden", "link": url_of(site, "/private"), "snippet": "snippet 5"},
    ]
    site.pages["/page"] = html()
    site.pages["/robots.txt"] = (200, {}, b"User-agent: *\nDisallow: /private")
    engine = sites()
    engine.pages = {"/search": (200, {}, json.dumps({"organic": results}).encode())}
    engine.server.RequestHandlerClass.do_POST = engine.server.RequestHandlerClass.do_GET
    retriever = Online(url=f"http://127.0.0.1:{engine.port}/search", pages="page", allow_hosts=["pages.test"], resolve=to_loopback)
    try:
        [hits] = retriever.search([SearchRequest("river", 5)])
        counted = retriever.counters()
    finally:
        retriever.close()
    assert [(hit.passage.title, hit.passage.text) for hit in hits] == [
        ("Good", "Vistula\n" + SENTENCES.strip()),
        ("Gone", "snippet 2"),
        ("Inside", "snippet 3"),
        ("Forbidden", "snippet 5"),
    ]
    assert [hit.score for hit in hits] == [1, 1 / 2, 1 / 3, 1 / 5]
    assert secret.asked == []
    assert {name: counted[f"online/page_{name}"] for name in ("fetches", "failed", "refused", "robots_refused")} == {
        "fetches": 3,
        "failed": 2,
        "refused": 1,
        "robots_refused": 1,
    }
