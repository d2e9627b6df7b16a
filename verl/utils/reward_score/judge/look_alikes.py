"""A text in the plain Latin letters that it looks like, so that a phrase is found however it is spelled (pure).

Invariants, character by character
- Compatibility forms come apart (NFKD, hence all that NFKC joins): full width, mathematical, circled, superscript.
- Case is folded. Accents and other marks are dropped.
- White space, punctuation, symbols and default-ignorable code points are dropped: zero width, soft hyphen, variation
  selectors, direction marks, tags, Hangul fillers.
- A Latin letter with a stroke, hook or tail, a small capital, a dotless, script, open or turned letter, one in a black
  circle or square, and a regional indicator are the letter in their Unicode name.
- Cyrillic, Greek, Armenian and Cherokee letters, and a few others, that look like a Latin one are it: `_LOOKS`.
- Digits that stand for letters are those (0 1 3 4 5 7 for o l e a s t), and i is l, so that a capital i is no disguise.

Not folded: symbols for letters ($ for s), two letters for one (rn for m), another order of letters, other words.
"""

from __future__ import annotations

import re
import unicodedata

# After Unicode's confusables.txt. Small and capital letters are listed apart: they may look like different ones.
_LOOKS = {
    "a": "\u0251\u0391\u03b1\u0410\u0430\u13aa",
    "b": "\u0392\u03b2\u0412\u042c\u0432\u044c\u13cf\u13f4",
    "c": "\u03f2\u03f9\u0421\u0441\u13df",
    "d": "\u0501\u13a0\u13e7",
    "e": "\u018f\u0190\u0259\u025b\u0395\u03b5\u0415\u0435\u04bd\u13ac",
    "f": "\u03dc\u03dd\u0492\u0493",
    "g": "\u0581\u13c0\u13e9",
    "h": "\u0397\u041d\u043d\u04ba\u04bb\u0570\u13bb\u13c2",
    "i": "\u0269\u0399\u03b9\u0406\u0456\u13a5\ua7fe",
    "j": "\u037f\u03f3\u0408\u0458\u0575\u13ab",
    "k": "\u039a\u03ba\u041a\u043a\u13e6",
    "l": "\u01c0\u04c0\u04cf\u053c\u056c\u13de",
    "m": "\u039c\u041c\u043c\u13b7",
    "n": "\u039d\u03b7\u043f\u0548\u0578",
    "o": "\u039f\u03bf\u041e\u043e\u0555\u0585",
    "p": "\u03a1\u03c1\u0420\u0440\u13e2",
    "q": "\u051a\u051b\u0563\u0566",
    "r": "\u01a6\u0433\u13a1\u13d2",
    "s": "\u01a7\u01a8\u0283\u0405\u0455\u054f\u13d5\u13da",
    "t": "\u03a4\u03c4\u0422\u0442\u13a2",
    "u": "\u03bc\u03c5\u054d\u057d",
    "v": "\u03bd\u0474\u0475\u13d9",
    "w": "\u03c9\u051c\u051d\u0561\u13b3\u13d4",
    "x": "\u03a7\u03c7\u0425\u0445",
    "y": "\u03a5\u03b3\u0423\u0443\u04ae\u04af\u13a9\u13bd",
    "z": "\u0396\u13c3",
}
_DIGITS = str.maketrans("013457i", "oleastl")
_HANGUL_FILLERS = "\u115f\u1160"
"""Letters to Unicode, and invisible; U+3164 and U+FFA0 decompose into U+1160."""
_NAMED = re.compile(r"(?:.* )?LATIN .*?LETTER (?:[A-Z-]{2,} )*([A-Z])(?: WITH .+)?|REGIONAL .* LETTER ([A-Z])")


def plain_letters(text: str) -> str:
    """The text as lower-case letters and digits, look-alikes folded; what has none of them in it is dropped.

    Example: `plain_letters("R\\u0435fer\\u200b to") == "referto"`, with a Cyrillic e and a zero-width space.
    """
    return text.translate(_FOLDED)


class _Folded(dict[int, str]):
    """Code point -> what stands for it, found at its first use."""

    def __missing__(self, code: int) -> str:
        self[code] = found = _fold(chr(code)).translate(_DIGITS)
        return found


def _fold(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf" or category.startswith("M") or char in _HANGUL_FILLERS:
        return ""
    if char in _LATIN:
        return _LATIN[char]
    apart = unicodedata.normalize("NFKD", char)
    if apart != char:
        return "".join(map(_fold, apart))
    folded = char.casefold()
    if folded != char:
        return "".join(map(_fold, folded))
    named = _NAMED.fullmatch(unicodedata.name(char, ""))
    if named:
        return (named[1] or named[2]).lower()
    return char if char.isalnum() else ""


_LATIN = {look: letter for letter, looks in _LOOKS.items() for look in looks}
_FOLDED = _Folded()
