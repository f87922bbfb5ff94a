"""What a response gives as its final answer.

A response has one final answer: what it says last in the strongest form that it uses. Math-verify's own search would
also take any formula or number of the text, so a response that was cut off, or that never commits itself, would be
graded by chance.
"""

from __future__ import annotations

import re

# An escaped brace groups nothing. A box without braces holds a number or a letter, \\boxed 3.
TOKEN = re.compile(
    r"\\(?:boxed|fbox)(?:\s*\{|\s*(?P<bare>-?\d+(?:\.\d+)?)|\s+(?P<letter>[A-Za-z])(?![A-Za-z]))|\\.|[{}]"
)
# Several boxes are one list if nothing but this is between them.
LIST = re.compile(r"(?:[\s$]|\\[)\]])*(?:[,;]|(?:[,;]\s*)?(?:and|or|\\text\s*\{\s*(?:and|or)\s*\}))(?:[\s$]|\\[(\[])*")
# 답 is the end of 정답, too.
LINE = re.compile(r"(?i)(?:\banswer\**\s*[:：]|(?:答案|正解|答え|답)\**\s*[:：]|####)\**\s*([^\n]+)")
SENTENCE = re.compile(r"(?i)\b(?:the|final)\s+answer\s+is(?![a-z])|答案(?:是|为|為)|정답은")
SENTENCE_END = re.compile(r"\.\s|[\n。]")
LONGEST_SENTENCE = 2000
THINK_END, TAG, TAG_END = "</think>", "<answer>", "</answer>"


def final_answer(response: str) -> str | None:
    """What the last box (or list of boxes) or <answer> tag holds, whichever ends last; else the last "Answer:" line (or
    "####", or one in Chinese, Japanese or Korean); else the last sentence "The answer is ..."; else None. What follows
    the last </think> counts alone, if there is an answer there. An unclosed box was cut off and is none. Takes time in
    proportion to the length.
    """
    _, mark, after = response.rpartition(THINK_END)
    found = _answer_in(after) if mark else None
    return _answer_in(response) if found is None else found


def _answer_in(text: str) -> str | None:
    end = text.rfind(TAG_END)
    start = text.rfind(TAG, 0, max(end, 0))
    if start >= 0 and not _boxes(text[end:]):
        inner = text[start + len(TAG) : end]
        return _without_tags(inner) or inner.strip() or None
    return _without_tags(text)


def _without_tags(text: str) -> str | None:
    boxes = _boxes(text)
    if boxes:
        return ", ".join(dict.fromkeys(boxes))
    lines = LINE.findall(text)
    return lines[-1] if lines else _sentence(text)


def _sentence(text: str) -> str | None:
    """What the last sentence "The answer is ..." says, up to a full stop or the end of its line."""
    for match in reversed(list(SENTENCE.finditer(text))):
        rest = text[match.end() : match.end() + LONGEST_SENTENCE].lstrip().removeprefix(":").removeprefix("：").lstrip()
        said = SENTENCE_END.split(rest, maxsplit=1)[0].strip()
        if said:
            return said
    return None


def _boxes(response: str) -> list[str]:
    """The contents of the last closed box, and of those before it that form one list with it. One pass: linear time."""
    opened: list[tuple[int, int]] = []  # (start of the token, start of the content); plain groups have content -1
    found: list[tuple[int, int, int]] = []
    for token in TOKEN.finditer(response):
        bare = token["bare"] or token["letter"]
        if bare:
            found.append((token.start(), token.end() - len(bare), token.end()))
        elif token[0] == "{" or len(token[0]) > 2:
            opened.append((token.start(), token.end() if len(token[0]) > 2 else -1))
        elif token[0] == "}" and opened:
            start, content = opened.pop()
            if content >= 0:
                found.append((start, content, token.start()))
    found.sort()
    boxes: list[str] = []
    next_start = 0
    for start, content, end in reversed(found):
        if boxes and not LIST.fullmatch(response[end:next_start].removeprefix("}")[:50]):
            break
        boxes.append(response[content:end])
        next_start = start
    return boxes[::-1]
