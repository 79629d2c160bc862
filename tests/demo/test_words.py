import pytest

from act_peft.demo.words import LARGEST_NUMBER, Language, number_words, operator_words, vocabulary
from act_peft.errors import ActValueError

NUMBERS = range(LARGEST_NUMBER + 1)

SPELLED = [
    (0, "zero", "null", "cero"),
    (1, "one", "eins", "uno"),
    (12, "twelve", "zwoelf", "doce"),
    (17, "seventeen", "siebzehn", "diecisiete"),
    (20, "twenty", "zwanzig", "veinte"),
    (21, "twenty one", "ein und zwanzig", "veintiuno"),
    (30, "thirty", "dreissig", "treinta"),
    (42, "forty two", "zwei und vierzig", "cuarenta y dos"),
    (59, "fifty nine", "neun und fuenfzig", "cincuenta y nueve"),
    (71, "seventy one", "ein und siebzig", "setenta y uno"),
    (99, "ninety nine", "neun und neunzig", "noventa y nueve"),
]


@pytest.mark.parametrize(("number", "english", "german", "spanish"), SPELLED)
def test_known_spellings(number, english, german, spanish):
    assert number_words(number, Language.ENGLISH) == english
    assert number_words(number, Language.GERMAN) == german
    assert number_words(number, Language.SPANISH) == spanish


@pytest.mark.parametrize("language", Language)
def test_every_number_has_its_own_words(language):
    assert len({number_words(number, language) for number in NUMBERS}) == LARGEST_NUMBER + 1


@pytest.mark.parametrize("language", Language)
def test_words_are_plain_ascii_separated_by_single_spaces(language):
    for number in NUMBERS:
        words = number_words(number, language).split(" ")
        assert 1 <= len(words) <= 3
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize(("one", "other"), [("en", "de"), ("en", "es"), ("de", "es")])
def test_languages_share_no_number_words(one, other):
    def words(language):
        return {word for number in NUMBERS for word in number_words(number, Language(language)).split()}

    assert not words(one) & words(other)


@pytest.mark.parametrize("language", Language)
def test_operators_are_no_number_words(language):
    numbers = {word for number in NUMBERS for word in number_words(number, language).split()}
    assert not numbers & set(operator_words(language))


def test_operator_pairs_differ_between_languages():
    assert len({operator_words(language) for language in Language}) == len(Language)


def test_vocabulary_is_sorted_unique_and_complete():
    words = vocabulary()
    assert words == sorted(set(words))
    for language in Language:
        assert {word for number in NUMBERS for word in number_words(number, language).split()} <= set(words)
        assert set(operator_words(language)) <= set(words)


@pytest.mark.parametrize("number", [-1, 100])
def test_numbers_without_words_are_refused(number):
    with pytest.raises(ActValueError, match=rf"number_words: got {number}, expected a number from 0 to 99"):
        number_words(number, Language.GERMAN)
