"""Phrases by which answers of chat models are known: refusals, and what they say of themselves and at the end.

Patterns have bounded repetition: a hostile row of megabytes takes linear time.
"""

import re

from sft_jax.doctor.personal_data import snippet
from sft_jax.doctor.texts import Texts

_WINDOW = 100_000  # characters of an answer that are looked at
_END = 300  # at its end, in which it takes its leave

_SORRY = (
    r"(?:(?:i['’]m|i am) (?:very |so |really |truly )?sorry|sorry|i apologi[sz]e|my apologies|unfortunately)\b[^.\n]{0,80}?\b"
)
_CANNOT = (
    r"(?:i (?:\w{1,20} )?(?:can['’]t|cannot|am unable to|am not able to|won['’]?t|will not|must decline to|have to decline to)"
    r"|i['’]m (?:unable|not able) to|i['’]ll have to decline to)"
)
_GIVE_HELP = r"(?:help|assist|provide|fulfill?|comply|support|engage|create|generate|produce)"
_GIVING = r"(?:helping|assisting|providing|supporting|engaging|creating|generating|producing|answering|discussing|writing|sharing)"
_DO_ANYTHING = (
    rf"(?:{_GIVE_HELP}|write|offer|give|share|answer|respond|process|perform|access|complete|participate|continue|discuss"
    r"|do that|do this|be able|browse|order|book)"
)
_REFUSAL = re.compile(
    rf"{_SORRY}{_CANNOT} {_DO_ANYTHING}\b"
    rf"|{_SORRY}i (?:currently )?(?:do not have|don['’]t have|lack) (?:currently )?(?:the )?(?:capabilit|abilit)"
    rf"|{_CANNOT} {_GIVE_HELP} (?:you )?(?:with|in|to|any|that|this|such|your|the request|content|information)\b"
    rf"|{_CANNOT} (?:help|assist|comply)\b[.!]|i must (?:\w{{1,20}} )?decline\b"
    rf"|{_CANNOT} (?:do|answer) (?:that|this|it|(?:that|this|your) (?:question|request))\s?(?:[.!,;]|\Z)"
    rf"|i(?:['’]m not| am not| don['’]t feel| do not feel) comfortable (?:with )?{_GIVING}\b"
    r"|(?:很?抱歉|对不起)[^。\n]{0,20}我(?:不能|无法)(?:提供|帮助|协助|满足|回答|参与|执行)",
    re.IGNORECASE,
)
_AI = r"(?:ai|artificial intelligence)"
_BOILERPLATE = re.compile(
    rf"\bas an? {_AI}(?:[- ](?:language )?(?:model|assistant|system|chatbot))?(?:,| i\b)"
    rf"|\bas a (?:large )?language model(?:,| i\b)|\bi(?:['’]m| am) (?:just |only )?an? {_AI} (?:language )?model\b"
    r"|\bmy (?:knowledge|training data) (?:cut-?off|only goes)"
    r"|\bas of my (?:last |latest )?(?:knowledge |training )?(?:update|cut-?off)\b"
    r"|\bregenerate response\b|\bi (?:was )?trained by openai\b|作为(?:一[个名])?(?:ai|人工智能)(?:语言)?(?:模型|助手)",
    re.IGNORECASE,
)

# What an answer ends with. "Let me know if you can come" is a letter's.
_LEAVE = re.compile(
    r"\bi hope (?:this|that|it) (?:helps|was helpful|is helpful|answers your question)\b"
    r"|\b(?:please )?(?:let me know|feel free to (?:ask|reach out|contact me)) if (?:you (?:have|need|['’]?d like|would like|want)"
    r"|there(?:['’]s| is) anything)\b",
    re.IGNORECASE,
)


def refusal(texts: Texts) -> list[str]:
    """Finds answers that begin by declining. "Sorry, I can't make it" is no refusal: what is declined must be help."""
    for answer in texts.answers:
        if _REFUSAL.match(answer.lstrip(" \t\r\n\"'“")[:400]):
            return [snippet(answer)]
    return []


def boilerplate(texts: Texts) -> list[str]:
    """Finds phrases in which a chat model speaks of itself, and those with which it ends its answers."""
    for answer in texts.answers:
        found = _BOILERPLATE.search(answer[:_WINDOW])
        if found:
            return [snippet(answer[found.start() :])]
        end = answer[-_END:].rstrip().rpartition("\n")[2]
        found = _LEAVE.search(end)
        if found:
            return [snippet(end[found.start() :])]
    return []
