"""Number words from 0 to 99 in three languages, split so that every word is one token.

All words are plain ASCII ("fuenf", "dieciseis"). A compound number is written as separate words if the language builds
it from parts ("zwei und vierzig", "forty two", "treinta y uno").
"""

from enum import Enum

from act_peft.errors import ActValueError

LARGEST_NUMBER = 99


class Language(str, Enum):
    """A language of the demo's arithmetic."""

    ENGLISH = "en"
    GERMAN = "de"
    SPANISH = "es"


_SMALL_WORDS = {
    Language.ENGLISH: (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen"
    ),
    Language.GERMAN: (
        "null eins zwei drei vier fuenf sechs sieben acht neun zehn elf zwoelf dreizehn vierzehn fuenfzehn sechzehn "
        "siebzehn achtzehn neunzehn"
    ),
    Language.SPANISH: (
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciseis "
        "diecisiete dieciocho diecinueve veinte veintiuno veintidos veintitres veinticuatro veinticinco veintiseis "
        "veintisiete veintiocho veintinueve"
    ),
}

_TENS_WORDS = {
    Language.ENGLISH: "twenty thirty forty fifty sixty seventy eighty ninety",
    Language.GERMAN: "zwanzig dreissig vierzig fuenfzig sechzig siebzig achtzig neunzig",
    Language.SPANISH: "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
}

_SMALL = {language: words.split() for language, words in _SMALL_WORDS.items()}
_TENS = {language: words.split() for language, words in _TENS_WORDS.items()}

_OPERATORS = {
    Language.ENGLISH: ("plus", "equals"),
    Language.GERMAN: ("plus", "gleich"),
    Language.SPANISH: ("mas", "igual"),
}


def _english(tens: str, ones: str) -> str:
    return f"{tens} {ones}"


def _german(tens: str, ones: str) -> str:
    return f"{'ein' if ones == 'eins' else ones} und {tens}"


def _spanish(tens: str, ones: str) -> str:
    return f"{tens} y {ones}"


_COMPOUND = {Language.ENGLISH: _english, Language.GERMAN: _german, Language.SPANISH: _spanish}


def number_words(number: int, language: Language) -> str:
    """Spell a number.

    Args:
        number: from 0 to 99.
        language: the language of the words.

    Returns:
        The words, with single spaces between them: `number_words(42, Language.GERMAN)` is `"zwei und vierzig"`.

    Raises:
        ActValueError: the number is out of range.
    """
    if not 0 <= number <= LARGEST_NUMBER:
        raise ActValueError(f"number_words: got {number}, expected a number from 0 to {LARGEST_NUMBER}")
    small = _SMALL[language]
    if number < len(small):
        return small[number]
    tens, ones = divmod(number, 10)
    if ones == 0:
        return _TENS[language][tens - 2]
    return _COMPOUND[language](_TENS[language][tens - 2], small[ones])


def operator_words(language: Language) -> tuple[str, str]:
    """The words for "+" and "=" in a language."""
    return _OPERATORS[language]


def vocabulary() -> list[str]:
    """Every word that any language uses, sorted, each once."""
    texts = [number_words(number, language) for language in Language for number in range(LARGEST_NUMBER + 1)]
    texts += [" ".join(operator_words(language)) for language in Language]
    return sorted({word for text in texts for word in text.split()})
