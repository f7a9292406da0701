"""Plain text from what the web holds: snippets with markup, pages of HTML."""

from __future__ import annotations

import codecs
import html
import re

_EMPHASIS = re.compile(r"</?(?:strong|b|em|i|u|mark|span|sup|sub|wbr|br)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff\ud800-\udfff]")
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_TEXT_CODECS = re.compile(
    r"utf-8|ascii|utf-16(-[lb]e)?|iso8859-\d+|cp(125\d|866|874|932|949|950)|koi8-[ru]|gbk?|gb2312|gb18030|big5|big5hkscs|euc[-_](jp|kr)"
    r"|shift_jis|iso2022_jp|mac-(roman|cyrillic)"
)
"""Python's names of the encodings that pages are written in; others, such as punycode or unicode_escape, are no way to write a page."""


class UnreadablePage(Exception):
    """There is no text for people on the page, or none that can be found."""


def plain_text(text: str, markup: bool = True) -> str:
    """The text on one line: no control characters, no lone surrogates; with ``markup``, no tags of emphasis, and entities as the characters they stand for."""
    if markup:
        text = html.unescape(_EMPHASIS.sub("", text))
    return " ".join(_CONTROL.sub(" ", text).split())


def decode(body: bytes, charset: str | None) -> str:
    """The characters of a page.

    As browsers do: a byte-order mark counts first, then the ``charset`` of the HTTP header, then the one in the first bytes of the page; without any
    it is UTF-8, or Windows' western encoding where it cannot be that. Wrong bytes become U+FFFD.
    """
    for mark, marked in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if body.startswith(mark):
            return body.decode(marked, "replace")
    declared = _CHARSET.search(body, 0, 4096)
    for name in (charset, None if declared is None else declared[1].decode("ascii")):
        codec = _text_codec(name)
        if codec is not None:
            return body.decode(codec, "replace")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(body)  # the end may have been cut within a character
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")


def text_of_html(page: str) -> str:
    """What people come to read on a page: no menus, no footers, no markup, one line for each paragraph.

    Raises
    ------
    UnreadablePage
        Nothing was found.
    """
    import trafilatura

    try:
        text = trafilatura.extract(page, include_comments=False, include_tables=True, include_formatting=False, with_metadata=False)
    except Exception as error:  # whatever a page breaks in the parsers is the page's fault
        raise UnreadablePage(f"{type(error).__name__}: {error}") from error
    return text_of_lines(text or "")


def text_of_lines(text: str) -> str:
    """Plain text without control characters and blank lines; :class:`UnreadablePage` where nothing is left."""
    lines = [" ".join(_CONTROL.sub(" ", line).split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UnreadablePage("no text for people was found")
    return "\n".join(lines)


def _text_codec(name: str | None) -> str | None:
    try:
        codec = codecs.lookup(name or "").name
    except (LookupError, ValueError):
        return None
    if codec in ("iso8859-1", "ascii"):
        return "cp1252"  # what pages that say so are written in
    return codec if _TEXT_CODECS.fullmatch(codec) else None
