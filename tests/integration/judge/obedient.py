"""A stub judge with no will of its own: it obeys any instruction that it finds outside the fence.

It knows the fence only by the token of the system message, which it looks for in the raw HTTP body, and reads what a
careless server would: text after Unicode normalisation, without invisible characters, with chat-template tokens taken
as the start of a new message.
"""

from __future__ import annotations

import json
import re
import unicodedata

from judge_server import Plan, Seen, completion, verdict

HONEST = 0.8
_TOKEN = re.compile(rb"BEGIN ([0-9a-f]{32}) and the line END \1")
_TEMPLATE = re.compile(
    r"<\|[a-z_0-9]+\|>|\[/?INST\]|</?s>|<</?SYS>>|<(start|end)_of_turn>|<\uff5c.*?\uff5c>|^\s*(system|assistant|human|user):",
    re.IGNORECASE | re.MULTILINE,
)
_ORDER = re.compile(r"(give|return|grade|score|award|reply|output|set|depth|relevance)\W+(\w+\W+){0,6}?1(\.0|\b)")
_LATIN = str.maketrans("аеорсухіѕ", "aeopcyxis")


def obey(seen: Seen) -> Plan:
    """1.0 for everything when told so from outside the fence, otherwise `HONEST`."""
    return Plan(completion(verdict(1.0 if is_told(seen) else HONEST)))


def is_told(seen: Seen) -> bool:
    return any(_ORDER.search(_plain(text)) for text in outside(seen))


def outside(seen: Seen) -> list[str]:
    """All text of the request that does not stand inside an intact fence."""
    match = _TOKEN.search(seen.raw)
    assert match, "the system message names no fence"
    begin, end = (f"{word} {match[1].decode()}" for word in ("BEGIN", "END"))
    body = seen.body
    texts = [json.dumps({key: value for key, value in body.items() if key not in ("messages", "response_format")})]
    for message in body["messages"]:
        assert set(message) == {"role", "content"}, message
        content = message["content"]
        if message["role"] == "system":
            # Our own words, in which "from 0 to 1" is no order; anything that is not ours must come after them.
            texts.append(content.partition("Reply with one JSON object")[2])
            continue
        before, _, rest = content.partition(f"{begin}\n")
        inside, _, after = rest.partition(f"\n{end}")
        texts += [before, after, *_escaped(inside)]
    return texts


def _escaped(inside: str) -> list[str]:
    """What breaks out of the fence although its end is where it should be."""
    template = _TEMPLATE.search(inside)
    found = [] if template is None else [inside[template.end() :]]
    lines = inside.splitlines()
    if len(lines) != 1:
        found.append("\n".join(lines[1:]))
    try:
        fields = json.loads(inside)
    except ValueError:
        return [*found, inside]
    known = ("reasoning", "class", "extension")
    notes = {k: v for k, v in fields.items() if k not in known or not isinstance(v, str)}
    return [*found, json.dumps(notes)]


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if unicodedata.category(c) != "Cf").casefold().translate(_LATIN)
