"""Tokens of the text form of op graphs, and what reading them by recursive descent takes. See `jax_mpk.ir.parse`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

from jax_mpk.errors import MpkError

T = TypeVar("T")
_TOKEN = re.compile(r"(?P<comment>#[^\n]*)|(?P<float>\d+(\.\d+)?e[+-]?\d+|\d+\.\d+)|(?P<unsigned>\d+u)|(?P<int>\d+)"
                    r"|(?P<word>[A-Za-z_][\w.]*)|(?P<space>\s+)|(?P<sign>//|<=|==|!=|<<|>>|.)")  # fmt: skip


class ParseError(MpkError, ValueError):
    """The text is no op graph. `line` and `column` (from 1) say where; the message, what was expected there."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column = line, column


class Token(NamedTuple):
    kind: str  # float, unsigned, int, word, sign or end
    text: str
    at: int


class Reader:
    """A text and the place of the next token. `comments`: by the number of the token that comes next."""

    def __init__(self, text: str, start: int = 0) -> None:
        self.text, self.next = text, 0
        self.tokens: list[Token] = []
        self.comments: dict[int, str] = {}
        while start < len(text):
            found = _TOKEN.match(text, start)
            assert found is not None and found.lastgroup is not None
            if found.lastgroup == "comment":
                self.comments.setdefault(len(self.tokens), found.group()[1:].strip())
            elif found.lastgroup != "space":
                self.tokens.append(Token(found.lastgroup, found.group(), start))
            start = found.end()
        self.tokens.append(Token("end", "", start))

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """Raises, at an offset of the text or the next token."""
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        raise ParseError(message, line, at - self.text.rfind("\n", 0, at))

    def expected(self, what: str) -> NoReturn:
        token = self.tokens[self.next]
        self.fail(f"{what} expected, not {repr(token.text) if token.text else 'the end'}")

    @property
    def at(self) -> int:
        return self.tokens[self.next].at

    @property
    def kind(self) -> str:
        return self.tokens[self.next].kind

    def peek(self, ahead: int = 0) -> str:
        """The text of a token to come."""
        return self.tokens[min(self.next + ahead, len(self.tokens) - 1)].text

    def advance(self) -> str:
        self.next += 1
        return self.tokens[self.next - 1].text

    def accept(self, *texts: str) -> str:
        """The next token if it is one of these, else nothing."""
        return self.advance() if self.peek() in texts else ""

    def expect(self, *texts: str) -> None:
        """These tokens, one after the other."""
        for text in texts:
            if not self.accept(text):
                self.expected(repr(text))

    def one_of(self, what: str, *texts: str) -> str:
        return self.accept(*texts) or self.expected(f"{what} ({', '.join(texts)})")

    def word(self, what: str) -> str:
        return self.advance() if self.kind == "word" else self.expected(what)

    def integer(self, what: str = "an integer", least: int | None = None) -> int:
        at, sign = self.at, -1 if self.accept("-") else 1
        value = sign * int(self.advance()) if self.kind == "int" else self.expected(what)
        return value if least is None or value >= least else self.fail(f"{what} is at least {least}, not {value}", at)

    def several(self, one: Callable[[], T], end: str) -> tuple[T, ...]:
        """Something, any number of times, between commas, and `end`."""
        out: list[T] = []
        while not self.accept(end):
            if out and not self.accept(","):
                self.expected(f"',' or {end!r}")
            out.append(one())
        return tuple(out)
