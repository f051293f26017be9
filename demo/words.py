"""The vocabulary of the demo world: words, names and small random pieces of text.

Everything here is drawn from a `random.Random` that the caller seeds. This module must not
know tasks, prompts, models or files.
"""

from random import Random
from string import ascii_lowercase, ascii_uppercase


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _split(
    "Ana Ben Carla David Elena Femi Grace Hugo Ines Jonas Kofi Lena Maria Nadia Omar Paula Quinn "
    "Rosa Sam Tara Uma Victor Wanda Yusuf Zoe Alice Boris Chloe Dan Emma Felix Gina Hana Ivan "
    "Julia Karl Lucy Marco Nina Oscar Peter Rita Simon Tom Vera Will Amir Bella Clara Diego"
)
LAST_NAMES = _split(
    "Lopez Novak Smith Okafor Rossi Weber Silva Tanaka Khan Moreau Jensen Kim Patel Brown Garcia "
    "Popov Meyer Costa Wright Haddad Olsen Sato Murphy Nowak Duarte Fischer Adams Bauer Chen Evans"
)
CITIES = _split(
    "Oslo Paris Madrid Lima Cairo Berlin Rome Tokyo Lagos Boston Delhi Quito Dublin Prague "
    "Vienna Seoul Milan Porto Athens Denver Lyon Geneva Havana Kyoto Leeds"
)
COUNTRIES = _split(
    "Spain France Italy Norway Japan Peru Egypt Brazil Canada Kenya Poland Chile India Mexico "
    "Greece Sweden Portugal Ireland Turkey Ghana"
)
ITEMS = _split(
    "lamp phone chair laptop kettle camera jacket desk printer watch tablet blender backpack "
    "speaker keyboard monitor mirror toaster charger heater scooter tent guitar helmet sofa clock "
    "router bicycle fan drone"
)
MONTHS = _split(
    "January February March April May June July August September October November December"
)
COLOURS = _split("red blue green black white grey brown yellow orange pink")
ANIMALS = _split("fox dog cat horse bird mouse tiger rabbit sheep goat duck bear wolf frog")
PLACES = _split("house river shop garden road office station forest market school kitchen park")
ADJECTIVES = _split(
    "small big old new quick slow happy quiet warm cold bright heavy light clean soft strong "
    "great awful lovely terrible cheap broken perfect poor excellent bad good nice"
)
PRAISE = _split(
    "great lovely excellent perfect wonderful fantastic good nice superb amazing brilliant clean "
    "friendly fresh tasty quick"
)
BLAME = _split(
    "awful terrible bad poor horrible useless dreadful broken disappointing rude ugly dirty cold "
    "slow boring nasty"
)
VERBS = _split("saw found liked bought sold moved carried wanted lost cleaned opened watched")
COMMON = _split(
    "the a and of to in is was it that for on with as at by this from be are or had not we you "
    "my your please help can will there here again today order refund parcel account password "
    "invoice charged card app login delivery late package payment return screen error question "
    "time work day week people water city number meeting lunch very really just still never"
)

_ONSETS = _split("b c d f g h j k l m n p r s t v w z br cl dr gr kr pl st tr sh th")
_VOWELS = _split("a e i o u a e i o ai ea ou")
_CODAS = (*_split("n r s l m t k d x ck nd st"), *[""] * 10)
_DOMAINS = _split("mail.com post.net home.org inbox.io shop.com work.net")


def made_up_word(rng: Random) -> str:
    """A pronounceable word that no list holds: it can be copied, never remembered."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 2, 3)))
    )


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()


def full_name(rng: Random) -> str:
    last = rng.choice(LAST_NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()
    return f"{first_name(rng)} {last}"


def email(rng: Random) -> str:
    user = rng.choice((made_up_word(rng), rng.choice(FIRST_NAMES).lower()))
    tail = rng.choice(("", str(rng.randint(1, 99)), "." + rng.choice(LAST_NAMES).lower()))
    return f"{user}{tail}@{rng.choice(_DOMAINS)}"


def phone(rng: Random) -> str:
    return f"{rng.randint(200, 999)}-{rng.randint(0, 9999):04d}"


def digits(rng: Random, low: int = 1, high: int = 5) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))


def plain_word(rng: Random) -> str:
    pools = (COMMON, COMMON, ADJECTIVES, ITEMS, ANIMALS, PLACES, VERBS, COLOURS)
    return rng.choice(rng.choice(pools)) if rng.random() < 0.8 else made_up_word(rng)


def phrase(rng: Random, low: int, high: int) -> str:
    return " ".join(plain_word(rng) for _ in range(rng.randint(low, high)))


def date_text(rng: Random) -> str:
    """A date as people write it."""
    day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1990, 2029)
    return rng.choice((f"{month} {day}, {year}", f"{day} {month} {year}", f"{month} {day} {year}"))


def random_string(rng: Random, low: int, high: int) -> str:
    """Letters, digits and marks without any pattern: the hardest text to copy."""
    alphabet = rng.choice(
        (
            ascii_lowercase,
            ascii_lowercase + " ",
            ascii_uppercase + ascii_lowercase,
            ascii_uppercase + " ",
            "0123456789",
            ascii_lowercase + "0123456789",
            ascii_lowercase + ascii_uppercase + "0123456789 .,:;-_'\"[]{}()<>=*@/?!$%&+",
        )
    )
    text = "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))
    return text.strip() or "x"
