"""Which language an answer is in, by py3langid: a model of 4 MB in its package, nothing to download."""

import functools
import re

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from sft_jax.doctor.texts import Texts, words

LOOKED_AT = 500  # characters of an answer
LEAST_WORDS = 6  # in which a language can be told
SURE = 0.95
_NO_LANGUAGE = "zxx"  # numbers, code
_DIALECTS = frozenset(
    ("wuu", "yue", "ary", "arz", "pcm", "nn", "bs")
)  # that readers of Chinese, Arabic, English, ... count as theirs
_NOT_PROSE = re.compile(
    r"```.{0,10000}?(?:```|\Z)|`[^`\n]{0,200}`|https?://\S{1,500}|<[^<>\n]{1,200}>|[\d+*/=_|#{}\[\]\\$^-]+", re.DOTALL
)
_NAMES = (
    "english french spanish german italian portuguese dutch russian ukrainian polish czech swedish norwegian danish finnish "
    "greek turkish arabic hebrew persian farsi hindi urdu bengali punjabi tamil telugu thai vietnamese indonesian malay "
    "tagalog filipino chinese mandarin cantonese japanese korean latin romanian hungarian swahili "
    "français español deutsch italiano"
).split()
_ASKS = re.compile(
    rf"\b(?:translat\w{{1,6}}|tradu\w{{1,8}}|übersetz\w{{0,6}}|{'|'.join(_NAMES)})\b|翻译|翻譯|英文|中文|法语|日语",
    re.IGNORECASE,
)


def language_of(texts: Texts) -> tuple[str, int]:
    """Returns the ISO 639-1 code of the language of the answers, or "" where that is not sure, and in how many words it is.

    Code, markup, numbers and links are no language, and a few words are too little to tell.
    """
    prose = _NOT_PROSE.sub(" ", "\n".join(texts.answers)[: 4 * LOOKED_AT] or texts.body[: 4 * LOOKED_AT])[:LOOKED_AT]
    count = len(words(prose))
    if count < LEAST_WORDS:
        return "", count
    language, probability = identifier().classify(prose)
    return (language if probability >= SURE and language != _NO_LANGUAGE else ""), count


def asks_for_language(texts: Texts) -> bool:
    """Returns whether a prompt speaks of a language, so that the answer may be in another one."""
    return bool(_ASKS.search(f"{texts.system[:10_000]}\n{texts.prompt[:10_000]}"))


@functools.cache
def identifier() -> LanguageIdentifier:
    """Returns the model, which is loaded once in a process."""
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages([label for label in model.labels if label not in _DIALECTS])
    return model
