"""Regular expressions in one spelling: two that differ in escapes, in the order within a class or in ``(?i:…)`` become the same text."""

from __future__ import annotations

CONTROL = {"\r": r"\r", "\n": r"\n", "\t": r"\t", "\f": r"\f", "\v": r"\v"}
SPECIAL, SPECIAL_IN_CLASS = set(".^$*+?()[]{}|\\"), set("\\]^-[&")
GROUPS = ("(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>")
COUNTS = {"{1}": "", "{1,}": "+", "{0,}": "*", "{0,1}": "?"}


def canonical(expression: str) -> str:
    """``expression`` (Oniguruma's syntax, as tokenizer.json has it) respelled; as it is when it has a construct that is not known here."""
    reader = _Reader(expression)
    try:
        text = "|".join(reader.alternatives(fold=False))
    except (IndexError, ValueError, OverflowError, RecursionError):
        return expression
    return text if reader.at == len(expression) else expression


class _Reader:
    """Recursive descent over an expression; ``fold``: inside ``(?i:…)``, where a letter stands for both its cases."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def peek(self, expected: str) -> bool:
        return self.text.startswith(expected, self.at)

    def take(self) -> str:
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self, *, fold: bool) -> list[str]:
        """Up to a closing parenthesis or the end; a group that is an alternative by itself is dissolved into its own."""
        found: list[str] = []
        while True:
            found += self.sequence(fold=fold)
            if not self.peek("|"):
                return found
            self.at += 1

    def sequence(self, *, fold: bool) -> list[str]:
        parts: list[tuple[str, list[str] | None]] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            atom, inner = self.atom(fold=fold)
            count = self.count()
            parts.append((atom + count, None if count else inner))
        if len(parts) == 1 and parts[0][1] is not None:
            return parts[0][1]
        return ["".join(atom for atom, _ in parts)]

    def atom(self, *, fold: bool) -> tuple[str, list[str] | None]:
        """An atom's text; with it, for a plain group, its alternatives."""
        if self.peek("("):
            return self.group(fold=fold)
        if self.peek("["):
            return self.bracket(fold=fold), None
        if self.text[self.at] in ".^$":
            return self.take(), None
        item = self.item()
        if fold and len(item) == 1 and item.isascii() and item.isalpha():
            return f"[{item.upper()}{item.lower()}]", None
        return (item if len(item) > 1 else literal(item, SPECIAL)), None

    def group(self, *, fold: bool) -> tuple[str, list[str] | None]:
        opening = next((group for group in GROUPS if self.peek(group)), "(")
        if opening == "(" and self.peek("(?"):
            raise ValueError(f"a group of an unknown kind at {self.at}")
        self.at += len(opening)
        inner = self.alternatives(fold=fold or opening == "(?i:")
        if self.take() != ")":
            raise ValueError(f"an unclosed group at {self.at}")
        if opening in ("(", "(?:", "(?i:"):
            return f"(?:{'|'.join(inner)})", inner
        return f"{opening}{'|'.join(inner)})", None

    def count(self) -> str:
        if self.at >= len(self.text) or self.text[self.at] not in "*+?{":
            return ""
        start = self.at
        self.at = self.text.index("}", self.at) + 1 if self.peek("{") else self.at + 1
        text = self.text[start : self.at]
        mode = self.take() if self.peek("?") or self.peek("+") else ""  # lazy or possessive
        return COUNTS.get(text, text) + mode

    def item(self) -> str:
        r"""One character, or an escape that stands for more: ``\p{L}``, ``\s``, ``\b``."""
        char = self.take()
        if char != "\\":
            return char
        escaped = self.take()
        if escaped in "pP" and self.peek("{"):
            start = self.at
            self.at = self.text.index("}", self.at) + 1
            return f"\\{escaped}{self.text[start : self.at]}"
        if not escaped.isalnum():
            return escaped
        if escaped in "ux":
            return self.code_point(escaped)
        return next((char for char, escape in CONTROL.items() if escape == f"\\{escaped}"), f"\\{escaped}")

    def code_point(self, kind: str) -> str:
        r"""The character of ``\u1234``, ``\x12`` or ``\x{1234}``."""
        if self.peek("{"):
            end = self.text.index("}", self.at)
            digits, self.at = self.text[self.at + 1 : end], end + 1
        else:
            n = 4 if kind == "u" else 2
            digits, self.at = self.text[self.at : self.at + n], self.at + n
        return chr(int(digits, 16))

    def bracket(self, *, fold: bool) -> str:
        """A class with its members in order; one that holds classes itself keeps its text."""
        start = self.at
        self.at += 1
        negated = self.peek("^")
        self.at += negated
        members: set[str] = set()
        while not self.peek("]"):
            if self.peek("[") or self.peek("&&"):
                return self.nested(start)
            members |= self.member(fold=fold)
        self.at += 1
        if len(members) == 1 and not negated:
            (only,) = members
            if len(only) == 1:
                return literal(only, SPECIAL)
            if only[:2] in (r"\p", r"\P", r"\s", r"\S", r"\d", r"\w"):
                return only
        return f"[{'^' if negated else ''}{''.join(sorted(literal(m, SPECIAL_IN_CLASS) if len(m) == 1 else m for m in members))}]"

    def member(self, *, fold: bool) -> set[str]:
        first = self.item()
        if self.peek("-") and not self.peek("-]"):
            self.at += 1
            last = self.item()
            ends = [(first, last)]
            if fold and (first + last).isascii() and (first + last).isalpha():
                ends = [(first.lower(), last.lower()), (first.upper(), last.upper())]
            return {f"{literal(a, SPECIAL_IN_CLASS)}-{literal(b, SPECIAL_IN_CLASS)}" for a, b in ends}
        if fold and len(first) == 1 and first.isascii():
            return {first.lower(), first.upper()}
        return {first}

    def nested(self, start: int) -> str:
        depth, self.at = 0, start
        while True:
            char = self.take()
            if char == "\\":
                self.at += 1
            depth += (char == "[") - (char == "]")
            if depth == 0:
                return self.text[start : self.at]


def literal(char: str, special: set[str]) -> str:
    """A character as itself, or escaped where it would mean something."""
    if char in CONTROL:
        return CONTROL[char]
    return f"\\{char}" if char in special else char
