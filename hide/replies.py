"""Which option a reply names: by its letter, in the ways that models are known to say it, or by its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from hide.tags import tagged

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Letters on a dark disc or square, which NFKC leaves alone; brackets are round ones from here on.
_TO_PLAIN = dict(zip(map(ord, "【】〔〕〖〗《》〈〉[]"), "()()()()()()", strict=True))
_TO_PLAIN |= {first + index: letter for first in (0x1F150, 0x1F170) for index, letter in enumerate(LETTERS)}
# LaTeX, and quotes and Markdown around words.
_AROUND = re.compile(r"\\(?:text|math)\w*|\\[()]|(?<!\w){0}+|{0}+(?!\w)".replace("{0}", "[*`\"“”„«»‹›「」『』{}'‘’_]"))

_THOUGHT = r"[<\[◁]{}(?:think|thinking|thought|reason|reasoning|analysis)[>\]▷]"
_THOUGHT_BEGINS = re.compile(_THOUGHT.format(""), re.IGNORECASE)
_THOUGHT_ENDS = re.compile(_THOUGHT.format("/"), re.IGNORECASE)
# Where a model puts its answer by itself.
_HELD = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)",
        r"<\|begin_of_box\|>([^<]*)",
        r"\"\w*(?:answer|choice|option|letter|prediction)\"\s*:\s*\[?\s*\"([^\"]*)",
        r"\\f?boxed\s*(?:\{|\\text\w*|\\math\w*|\s)*([^{}]*)",
    )
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>|</?(?:s|eos|bos|pad|end_of_turn)>", re.IGNORECASE)

# Chinese, Japanese and Korean go on right behind a letter, other writing does not.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_IN_WORD = rf"[^\W{_CJK}]"
# "答案是B超" is about ultrasound; these go on after a letter that stands for an option.
_CJK_BEHIND = "です|でし|だ|が|と|を|입니다|이다|예요|이에요|번|选|選|项(?!目)|項(?!目)|是|正确|正確|对|吧|为|因"
# No article stands before these.
_GOES_ON = r"(?:is|because|since|as|due|seems|looks|porque|parce|est|es|weil|denn|ist)\b"

_ANSWER = (
    r"(?:\b(?:answer|respuesta|réponse|risposta|resposta|antwoord|jawaban\w*|cevap|antwort|ответ)\b|\bans\b\.?|đáp án"
    r"|答案|答え|回答|解答|正解|정답|답|الإجابة|उत्तर)"
)
_CHOICE = r"(?:\b(?:option|choice|opción|opção|opzione|optie|вариант)\b|选项|選項|選択肢|선택지)"
_BETWEEN = (
    r"(?:[^\w.!?;。]|\b(?:is|are|would|should|must|will|be|to|the|that|it|most|likely|probably|definitely|clearly"
    r"|correct|right|best|choice|option|letter|es|la|el|correcta|opción|est|bonne|lettre|ist|die|richtige|buchstabe|è"
    r"|corretta|é|correta|letra|lettera|là|adalah)\b|应该?|该|为|是|选项?|择|は|の|은|는|이|가|هي)*"
)
_CHOOSING = (
    r"(?:\b(?:choose|select|pick|go(?:ing)? with|opt(?:ing)? for|vote for|settle (?:on|for)|would say|['’]d say|guess"
    r"|think|believe|(?:correct|right|best) (?:one )?is|elijo|escojo|choisis|wähle|it['’]?s|it is|that['’]s|this is"
    r"|(?:must|should|would) be|but|c['’]est|so|hence|thus|therefore|probably|likely|definitely|clearly|certainly|sure"
    r"|final)\b!?|=>|->|→|[选選]择?|選択|应该?是|正确的是|因此|所以|故)"
)
_RIGHT = (
    r"(?:is|seems|looks|would be|must be|est|es|ist|:|-)\s*(?:clearly |definitely |also )?"
    r"(?:correct|right|(?:the|my) (?:\w+ )?(?:answer|choice|option|one)\b|la (?:correcta|bonne)|richtig)"
)
_CJK_RIGHT = r"(?:选项|選項|项|項)?(?:是|为)?(?:正确|正確|对的)|です|でしょう|が正解|입니다|번|选项|選項|项(?!目)"
_REFUSING = (
    r"(?:\b(?:not|never|neither|rather than|instead of|rul(?:e|es|ed|ing) out|eliminat\w+|exclud\w+|unlike)\b|n['’]t\b"
    r"|不是|不选|不選|排除|并非|而非)(?:[^\w.!?;。]|\b(?:the|option|choice|answer|be|it['’]?s|choose|pick|select)\b|选项)*"
)
_REFUSED = (
    r"(?:\s+(?:is|was|seems|looks|can|does|would|est|ist)\s*(?:n['’]t\b|not\b)"
    r"|\W{0,2}\s*(?:is |seems |looks )?(?:clearly )?(?:wrong|incorrect|false|ruled out|eliminated|falsch)\b"
    r"|(?:选项|项)?(?:不对|不正确|不是|是?错)|ではな|は間違|が間違)"
)
_AND = r"\)?\s*(?:[,/&+、]|\b(?:or|and|nor|y|o|et|ou|und|oder)\b|[和或与及]|과|와|または)(?:\s|,|\b(?:or|and)\b)*"
_NEGATION = re.compile(r"(?:\b(?:not|no)|n['’]t|不是|没有) *(?:\b(?:the|an?|on|in|at|to|of|really|very|any)\b *)*$")


def read_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the option that `reply` names; `None` where it names none, several or what cannot be understood.

    Only the answer counts: what stands between tags (`hide.tags`), else, where a model marks its answer by itself, what
    stands there last (`<answer>`, a box of GLM, JSON, `\\boxed`), else what stands outside of thoughts (`<think>`). It
    is made plain (NFKC, no invisible characters, quotes, Markdown or LaTeX) and these rules are tried in order; the
    first that finds an option decides. Letters that are refused ("A is wrong", "not A") or listed ("A or B", options
    repeated one after another) do not count in 3 to 6.

    1. It is one letter, in either case: `B`, `b.`, `(b)`.
    2. It is one option's text, alone or behind its letter: `blue`, `B blue`.
    3. It says what the answer is, in one of a dozen languages: `Answer: b`, `the answer is (B)`, `答案是B`. The last
       such place counts.
    4. It starts with a letter and a mark or the end of the line, and no line with another: `B. blue`, `(b) blue`,
       `B、蓝色`.
    5. It says a letter in other words: `option B`, `B is correct`, `I'd go with B`, `It's B`, `选B`. The last counts.
    6. It has a line that is one upper-case letter, and none that is another.
    7. It has exactly one option's text in it, which no "not" and no other letter stands before.

    A lower-case letter counts in brackets, with a mark behind it, or as the last word of what 3 and 5 say; `a` there
    only behind a colon or "option". `A` and `I` before a word are none, unless the word is "is", "because" or the like.
    """
    if not options:
        return None
    letters = LETTERS[: len(options)]
    text = _plain(_answer(reply))
    exact = [_plain(option) for option in options]
    texts = [option.casefold().rstrip(".。") for option in exact]

    one = re.fullmatch(rf"\W*([{letters}{letters.lower()}])(?![+#])\W*", text)
    if one and (one[1] in letters or text not in exact):
        return one[1].upper()
    whole = text.casefold().strip().rstrip(".。!")
    if texts.count(whole) == 1:
        return letters[texts.index(whole)]
    behind = re.fullmatch(r"\(?(\w)\W+(.*)", whole, re.DOTALL)
    if behind and behind[1].upper() in letters and texts[letters.index(behind[1].upper())] == behind[2]:
        return behind[1].upper()

    said, starts, in_words, lines, listed, refused = _patterns(letters)
    counted = _without_lists(text, letters, exact)
    for pattern in (listed, refused):
        # A full stop, as no pattern reaches over it.
        counted = pattern.sub(" . ", counted)
    for pattern, all_agree in ((said, False), (starts, True), (in_words, False), (lines, True)):
        found = [match[match.lastindex or 0].upper() for match in pattern.finditer(counted)]
        if pattern is starts and not (found and starts.match(counted)):
            continue
        if found and (not all_agree or len(set(found)) == 1):
            return found[-1]
    named = _named(text, letters, texts)
    return named[0] if len(named) == 1 else None


def _answer(reply: str) -> str:
    """The part of a reply that is its answer."""
    ends = list(_THOUGHT_ENDS.finditer(reply))
    begins = _THOUGHT_BEGINS.search(reply)
    answer = reply[ends[-1].end() :] if ends else reply
    if ends and begins and not re.search(r"\w", answer):
        answer = reply[: begins.start()]
    between = tagged(answer)
    if between is not None:
        return between
    for pattern in _HELD:
        held = pattern.findall(answer)
        if held:
            return held[-1]
    unfinished = _THOUGHT_BEGINS.search(answer)
    return _SPECIAL_TOKEN.sub("", answer[: unfinished.start()] if unfinished else answer)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(_TO_PLAIN)
    # Format characters (BOM, joiners, directions) and the variation selectors of emoji.
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c not in "\ufe0e\ufe0f")
    return _AROUND.sub("", text).strip()


@lru_cache
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    """Rules 3 to 6, then lists and refusals; the last group of a match is the letter."""
    both, lower = letters + letters.lower(), re.sub("[ai]", "", letters.lower())
    bracketed = rf"\(\s*([{both}])\s*\)"
    no_article = rf"(?!(?<=[AI])[ \t]+(?!{_GOES_ON}|(?:or|and|nor)\b){_IN_WORD})"
    # Not in a word, an initialism (U.S., N/A, B-flat, C++) or another word of Chinese.
    alone = (
        rf"(?<!{_IN_WORD})(?<!\b[A-Za-z][-/&+.'’])[{letters}]"
        rf"(?!{_IN_WORD}|['’.\-/&]\w|[+#]|(?!{_CJK_BEHIND})[{_CJK}])"
    )
    upper = f"({alone}){no_article}"
    last = r"(?=\W{0,9}(?:\Z|\n)|[.,;:)](?!\w))"
    small = rf"(?<!{_IN_WORD})([{lower or '.'}]){last}"
    any_small = rf"([{letters.lower()}])(?:{last}|(?=\s+is\b))"
    done = rf"(?=\W{{0,9}}(?:\Z|\n)|\)?[.,;:!)。](?!\w)|\)?\s+{_GOES_ON}|[{_CJK}])"
    item = rf"(?:{bracketed}|{alone})"
    marked = (
        rf"(?:{bracketed}|\(?([{letters}])"
        rf"(?:[):,;、。]|\.(?!\w\b)|[ \t]+[-–—][ \t]|[ \t]+(?!is\b){_GOES_ON}|[ \t]*(?:\n|\Z))"
        rf"|([{letters.lower()}])[).:](?=\s|\Z))"
    )
    i = "(?i:{})".format
    return (
        re.compile(
            rf"{i(_ANSWER)}{i(_BETWEEN)}(?:{bracketed}|{upper}|{small})|{i(_ANSWER)}\s*[:=]\W*([{letters.lower()}]){last}"
        ),
        re.compile(rf"^(?:[-#>•]+[ \t]+)?{marked}", re.MULTILINE),
        re.compile(
            rf"{i(_CHOICE)}{i(_BETWEEN)}(?:{bracketed}|{upper})|{i(_CHOICE)}[^\w.]*{any_small}"
            rf"|{i(_CHOOSING)}{i(_BETWEEN)}(?:{bracketed}|{upper}{done}|{small})"
            rf"|({alone})\)?\s*(?:{i(_RIGHT)}|{_CJK_RIGHT})"
        ),
        re.compile(rf"^[^\w\n]*([{letters}])(?![+#])[^\w\n]*$", re.MULTILINE),
        re.compile(rf"{item}(?:{i(_AND)}{item})+{no_article}"),
        re.compile(rf"{i(_REFUSING)}(?:{bracketed}|{upper})|(?:{bracketed}|({alone})\)?){i(_REFUSED)}"),
    )


def _without_lists(text: str, letters: str, options: Sequence[str]) -> str:
    """`text` without options repeated one after another, each with its letter."""
    echo = "|".join(
        rf"\(?{letter}\W{{1,3}}{re.escape(option)}" for letter, option in zip(letters, options, strict=True) if option
    )
    between = r"\W*(?:\b(?:or|and)\b)?\W*"
    return re.sub(rf"(?<!\w)(?:{echo})(?:{between}(?:{echo}))+(?!\w)", " . ", text) if echo else text


def _named(text: str, letters: str, options: Sequence[str]) -> list[str]:
    """The letters of the options whose text stands in `text`; one within another, longer one does not count."""
    text, named = text.casefold(), []
    for option, letter in sorted(zip(options, letters, strict=True), key=lambda pair: -len(pair[0])):
        if not re.search(r"\w", option):
            continue
        pattern = re.compile(rf"(?<!{_IN_WORD})(?<!\d[.,]){re.escape(option)}(?!{_IN_WORD}|[.,]\d)")
        places = [match.start() for match in pattern.finditer(text)]
        before = [text[max(0, place - 60) : place] for place in places]
        marks = [re.search(r"(?:^|\W)\(?([a-z])[).:]\W*$", one) for one in before]
        if any(
            not _NEGATION.search(one) and (mark is None or mark[1].upper() == letter)
            for one, mark in zip(before, marks, strict=True)
        ):
            named.append(letter)
        text = pattern.sub(lambda match: "\0" * len(match[0]), text)
    return named
