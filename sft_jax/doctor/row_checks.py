"""Faults that one row shows on its own. Each check takes the texts of a row and returns what is wrong, mostly nothing.

Patterns have bounded repetition: a hostile row of megabytes takes linear time.
"""

import re

import ftfy.badness

from sft_jax.doctor.personal_data import find_personal_data, snippet
from sft_jax.doctor.texts import Texts, quantities, said, words

_WINDOW = 100_000  # characters at either end of an answer that patterns are looked for in
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
_CODE = re.compile(r"(?:```|~~~).{0,100000}?(?:```|~~~)|`[^`\n]{1,200}`", re.DOTALL)


def role_order(texts: Texts) -> list[str]:
    """Finds turns that follow each other as in no chat."""
    if texts.conversation is None or texts.conversation.kind != "chat":
        return []
    messages = texts.conversation.messages
    found, before = [], ""
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        place = f"messages[{index}]"
        if role == "system":
            if index and before != "system":
                found.append(f"{place}: a {message.role} message after others")
            before = before or role
            continue
        if role == "assistant" and before in ("", "system"):
            found.append(f"{place}: begins with the assistant")
        elif role in ("assistant", "user") and role == before:
            found.append(f"{place}: two turns of the {role} in a row")
        elif role == "tool" and before not in ("assistant", "tool"):
            found.append(f"{place}: a tool result without a turn of the assistant before it")
        elif role == "user" and before == "assistant" and messages[index - 1].calls:
            found.append(f"{place}: a turn of the user after a call of a tool, which has no result")
        elif role == "user" and before == "tool":
            found.append(f"{place}: a turn of the user after a tool result, which the assistant has not answered")
        before = role
    if before in ("user", "tool"):
        found.append(f"messages[{len(messages) - 1}]: ends with the {before}, so that nothing answers it")
    return found


def empty_answer(texts: Texts) -> list[str]:
    """Finds answers without a visible character."""
    total = len(texts.answers)
    return [
        f"answer {number} of {total} is empty" if total > 1 else "the answer is empty"
        for number, answer in enumerate(texts.answers, 1)
        if not any(character.isprintable() and not character.isspace() for character in answer)
    ]


def one_word_answer(texts: Texts) -> list[str]:
    """Finds rows all of whose answers are one word or number."""
    if not texts.answers:
        return []
    short = all(len(answer) <= 100 and len(answer.split()) == 1 and len(words(answer)) <= 1 for answer in texts.answers)
    return [f"the answer is {snippet(texts.answer)}"] if short else []


# Words that no sentence ends with: articles, conjunctions, and prepositions that are never the end of a relative clause.
_OPEN_WORDS = frozenset("a an the and or but nor because although whereas than my your our their its every such very".split())
_ITEM = re.compile(r"\s*(?:[-*•+|#>]|\(?[0-9a-zA-Z]{1,3}[.)]\s|\*\*)")
_ATTRIBUTION = re.compile(r"[-–—~] ?(?:[A-Z][\w.'’]{0,20}(?: |$)){1,4}$")  # "... - C. S. Lewis"
_STOP = tuple(".!?。！？…।؟۔\"'”’»)]}`>*:;|~_")


def cut_answer(texts: Texts) -> list[str]:
    """Finds answers that end in the middle of a sentence.

    A comma or a word such as "the" ends none. Without either, the last line must be a sentence of eight words or more among
    lines that end with full stops: lists, headings, verse, signatures and code end without one.
    """
    answer = texts.answer.rstrip()
    if len(words(answer[:2000])) < 8 or _FENCE.search(answer[-_WINDOW:].rpartition("\n")[2]):
        return []
    last = answer[-_WINDOW:].rpartition("\n")[2]
    token = last.split()[-1]
    detail = [f"ends with {snippet(answer, end=True)}"]
    if len(last.split()) >= 4 and (token.casefold() in _OPEN_WORDS and token != "A" or token[-1] in ",，、"):
        return detail
    if (
        not token[-1].isalpha()
        or "." in token
        or "/" in token
        or "@" in token
        or token[0] in "#_"
        or _ITEM.match(last)
        or _ATTRIBUTION.search(last[-80:])
    ):
        return []
    if token.isupper() and len(token) <= 3:  # "... option C"
        return []
    prose = [line.rstrip() for line in answer[-_WINDOW:].split("\n") if len(words(line[:2000])) >= 8]
    others = prose[:-1]
    sentences = ". " in last or "。" in last
    if len(words(last)) < 8 or not (others or sentences):
        return []
    stopped = sum(line.endswith(_STOP) for line in others)
    return detail if (stopped >= 0.7 * len(others) if others else sentences) else []


_SORRY = (
    r"(?:(?:i['’]m|i am) (?:very |so |really |truly )?sorry|sorry|i apologi[sz]e|my apologies|unfortunately)\b[^.\n]{0,80}?\b"
)
_CANNOT = (
    r"(?:i (?:\w{1,20} )?(?:can['’]t|cannot|am unable to|am not able to|won['’]?t|will not|must decline to|have to decline to)"
    r"|i['’]m (?:unable|not able) to|i['’]ll have to decline to)"
)
_GIVE_HELP = r"(?:help|assist|provide|fulfill?|comply|support|engage|create|generate|produce)"
_DO_ANYTHING = (
    rf"(?:{_GIVE_HELP}|write|offer|give|share|answer|respond|process|perform|access|complete|participate|continue|discuss"
    r"|do that|do this|be able|browse|order|book)"
)
_REFUSAL = re.compile(
    rf"{_SORRY}{_CANNOT} {_DO_ANYTHING}\b"
    rf"|{_SORRY}i (?:currently )?(?:do not have|don['’]t have|lack) (?:currently )?(?:the )?(?:capabilit|abilit)"
    rf"|{_CANNOT} {_GIVE_HELP} (?:you )?(?:with|in|to|any|that|this|such|your|the request|content|information)\b"
    rf"|{_CANNOT} (?:help|assist|comply)\b[.!]|i must decline\b"
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


def refusal(texts: Texts) -> list[str]:
    """Finds answers that begin by declining. "Sorry, I can't make it" is no refusal: what is declined must be help."""
    for answer in texts.answers:
        if _REFUSAL.match(answer.lstrip(" \t\r\n\"'“")[:400]):
            return [snippet(answer)]
    return []


def boilerplate(texts: Texts) -> list[str]:
    """Finds phrases in which a chat model speaks of itself, as in answers that were generated."""
    for answer in texts.answers:
        found = _BOILERPLATE.search(answer[:_WINDOW])
        if found:
            return [snippet(answer[found.start() :])]
    return []


def mojibake(texts: Texts) -> list[str]:
    """Finds text that was decoded with the wrong encoding, and characters that stand for bytes that were lost."""
    for text in _contents(texts):
        if "\ufffd" in text:
            place = text.index("\ufffd")
            return [f"a replacement character (U+FFFD) in {snippet(text[max(0, place - 30) :])}"]
        if not text.isascii():
            found = ftfy.badness.BADNESS_RE.search(text[:_WINDOW])
            if found:
                return [snippet(text[max(0, found.start() - 30) :])]
    return []


def unbalanced_fences(texts: Texts) -> list[str]:
    """Finds answers with a code block that is opened and not closed, by the rules of CommonMark."""
    for answer in texts.answers:
        opened = None
        for fence in _FENCE.finditer(answer):
            marks, rest = fence[1], fence[2]
            if opened is None:
                opened = None if marks[0] == "`" and "`" in rest else (marks, fence.start())
            elif marks[0] == opened[0][0] and len(marks) >= len(opened[0]) and not rest.strip():
                opened = None
        if opened is not None:
            return [f"a code block is not closed: {snippet(answer[opened[1] :])}"]
    return []


def repeats_prompt(texts: Texts) -> list[str]:
    """Finds answers that are the question again, or begin with all of it."""
    if not texts.answers:
        return []
    asked, answered = words(texts.question[:_WINDOW]), words(texts.answer[:_WINDOW])
    if len(asked) < 5 or answered[: len(asked)] != asked:
        return []
    if quantities(texts.question) != quantities(texts.answer[: len(texts.question) + 20]) and len(answered) == len(asked):
        return []
    return ["the answer is the question again" if len(answered) == len(asked) else "the answer begins with the whole question"]


_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end_of_text"
    r"|system|user|assistant|end|eos|bos|pad|end_of_turn|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|endofprompt)\|>"
    r"|<(?:start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<｜[^｜\n]{1,40}｜>"
    r"|^###\s?(?:Instruction|Response|Human|Assistant|Input):|^(?:Human|ASSISTANT|USER): ?"
    r"|\A\s{0,20}<s>(?!.{0,2000}</s>\s{0,20}\S)|</s>\s{0,20}\Z|\A\s{0,20}Assistant: ",
    re.MULTILINE,
)


def template_markup(texts: Texts) -> list[str]:
    """Finds the marks with which chat templates part turns, outside of code: the template would write them a second time."""
    for text in _contents(texts):
        if not any(mark in text for mark in ("<", "[", "###", "Human:", "ASSISTANT:", "USER:", "Assistant:")):
            continue
        if "`" in text or "~~~" in text:
            text = _CODE.sub(" ", text[:_WINDOW])
        found = _MARKUP.search(text)
        if found:
            return [f"{found[0].strip()} in {snippet(text[max(0, found.start() - 20) :])}"]
    return []


def personal_data(texts: Texts) -> list[str]:
    """Finds e-mail addresses, keys, card and account numbers, which are shown masked."""
    found = {}
    for text in _contents(texts):
        found.update(dict.fromkeys(find_personal_data(text)))
    return [f"{kind} {shown}" for kind, shown in found]


def _contents(texts: Texts) -> list[str]:
    """Returns everything that the row says: a text for what each turn says, its calls too, and what the assistant thought."""
    conversation = texts.conversation
    if conversation is None or conversation.kind == "text":
        return [texts.body]
    if conversation.kind == "chat":
        return [text for message in conversation.messages for text in (said(message), message.reasoning) if text]
    return [text for text in (conversation.system, conversation.prompt, conversation.completion) if text]
