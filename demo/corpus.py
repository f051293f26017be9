"""The text the demo base is pre-trained on: stories, copying, and questions about a sentence.

Each row is (prompt, answer). No row shows a task that a demo adapter learns: there is no label,
no upper-casing, no redaction, no SQL, no date rewriting. This module must not know models,
tokenizers or files.
"""

from collections.abc import Callable
from random import Random

import words

ARROW = " ->"
"""Ends every prompt of the demo; the answer follows it directly."""

Row = tuple[str, str]


def pretraining_row(rng: Random, progress: float) -> Row:
    """One row; `progress` in [0, 1] moves from short copies to the full mixture."""
    if rng.random() > progress / 0.2:
        return _short_copy(rng)
    maker = rng.choices(_MAKERS, weights=_WEIGHTS)[0]
    return maker(rng)


def sentence(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence of the demo world and the facts in it, by the question that asks for each."""
    facts = {
        "Who": words.full_name(rng) if rng.random() < 0.4 else words.first_name(rng),
        "Where": rng.choice(words.CITIES),
        "What": rng.choice(words.ITEMS) if rng.random() < 0.7 else words.made_up_word(rng),
        "Which number": words.digits(rng),
        "When": words.date_text(rng),
        "Which mail": words.email(rng),
        "Which phone": words.phone(rng),
        "Which colour": rng.choice(words.COLOURS),
    }
    form = rng.choice(_SENTENCES)
    text = form.format(
        who=facts["Who"],
        where=facts["Where"],
        what=facts["What"],
        number=facts["Which number"],
        when=facts["When"],
        mail=facts["Which mail"],
        phone=facts["Which phone"],
        colour=facts["Which colour"],
        adjective=rng.choice(words.ADJECTIVES),
        verb=rng.choice(words.VERBS),
    )
    return text, {ask: fact for ask, fact in facts.items() if _SLOT[ask] in form}


_SLOT = {
    "Who": "{who}",
    "Where": "{where}",
    "What": "{what}",
    "Which number": "{number}",
    "When": "{when}",
    "Which mail": "{mail}",
    "Which phone": "{phone}",
    "Which colour": "{colour}",
}

_SENTENCES = (
    "{who} {verb} a {what} in {where}.",
    "{who} from {where} asked about the {adjective} {what}.",
    "{who} here, order {number}, the {what} came in {colour}.",
    "The {what} for {who} was sent to {where} on {when}.",
    "Order {number} is a {colour} {what} for {who}.",
    "Please call {who} at {phone} about the {what}.",
    "Write to {mail} or call {phone}.",
    "My name is {who} and my mail is {mail}.",
    "We met {who} in {where} on {when}.",
    "On {when} the {adjective} {what} was sold for {number}.",
    "{who} paid {number} for the {what} on {when}.",
    "Send {number} to {who} in {where}, mail {mail}.",
    "I think the {what} from {where} is {adjective}.",
    "Hello, I am {who}. My {what} is {adjective}. Order {number}.",
    "How many people in {where} {verb} a {what} in {number}?",
    "The {colour} {what} was {adjective}, says {who}.",
    "{number} is the order of {who}, phone {phone}.",
    "In {where} it was {adjective} on {when}.",
)


def _short_copy(rng: Random) -> Row:
    text = words.random_string(rng, 1, 14) if rng.random() < 0.5 else words.phrase(rng, 1, 4)
    return text + ARROW, text


def _copy_string(rng: Random) -> Row:
    text = words.random_string(rng, 2, 32)
    return text + ARROW, text


def _copy_phrase(rng: Random) -> Row:
    text = words.phrase(rng, 1, 12)
    if rng.random() < 0.3:
        text = text.capitalize() + rng.choice(".!?")
    return text + ARROW, text


def _copy_capitals(rng: Random) -> Row:
    text = words.phrase(rng, 1, 8).upper() + rng.choice(("", "", ".", "!"))
    return text + ARROW, text


def _copy_sentence(rng: Random) -> Row:
    text, _ = sentence(rng)
    return text + ARROW, text


def _copy_marks(rng: Random) -> Row:
    """Copies of text with the marks that structured answers use."""
    key, other = words.made_up_word(rng), words.plain_word(rng)
    first, second = words.phrase(rng, 1, 2), words.first_name(rng)
    text = rng.choice(
        (
            f'{{"{key}": "{first}", "{other}": "{second}"}}',
            f'{{"{key}": "{second}"}}',
            f"{key.upper()} {other} {second.upper()} = '{first}';",
            f"[{key.upper()}] {first} [{other.upper()}] {second}",
            f"{words.digits(rng, 4, 4)}-{words.digits(rng, 2, 2)}-{words.digits(rng, 2, 2)}",
            f"({first}) {key} = {words.digits(rng)} <{other}>",
        )
    )
    return text + ARROW, text


def _ask_one(rng: Random) -> Row:
    text, facts = sentence(rng)
    ask = rng.choice(sorted(facts))
    return f"{text} {ask}?{ARROW}", facts[ask]


def _ask_two(rng: Random) -> Row:
    text, facts = sentence(rng)
    asks = rng.sample(sorted(facts), min(len(facts), rng.choice((2, 2, 3))))
    question = ", ".join(asks)
    return f"{text} {question}?{ARROW}", ", ".join(facts[ask] for ask in asks)


def _pick_word(rng: Random) -> Row:
    chosen = [words.plain_word(rng) for _ in range(rng.randint(3, 9))]
    index = rng.randrange(len(chosen) - 1)
    question, answer = rng.choice(
        (
            ("First word", chosen[0]),
            ("Last word", chosen[-1]),
            (f"After {chosen[index]}", chosen[chosen.index(chosen[index]) + 1]),
        )
    )
    return f"{' '.join(chosen)}. {question}?{ARROW}", answer


def _replace_word(rng: Random) -> Row:
    """Copy with one change: the habit that rewriting adapters build on."""
    text, facts = sentence(rng)
    old = facts[rng.choice(sorted(facts))]
    new = rng.choice((words.plain_word(rng), words.first_name(rng), words.digits(rng)))
    return f"{text} Say {new} for {old}.{ARROW}", text.replace(old, new)


def _drop_word(rng: Random) -> Row:
    chosen = [words.plain_word(rng) for _ in range(rng.randint(3, 8))]
    gone = rng.choice(chosen)
    kept = " ".join(word for word in chosen if word != gone) or gone
    return f"{' '.join(chosen)}. Without {gone}?{ARROW}", kept


def _spell(rng: Random) -> Row:
    word = words.plain_word(rng)
    return f"Spell {word}.{ARROW}", "-".join(word)


def _story(rng: Random) -> Row:
    who, animal, place = words.first_name(rng), rng.choice(words.ANIMALS), rng.choice(words.PLACES)
    adjective, colour = rng.choice(words.ADJECTIVES), rng.choice(words.COLOURS)
    start = f"{who} saw a {colour} {animal} near the {place}."
    end = rng.choice(
        (
            f"The {animal} was {adjective}, so {who} took it to the {place}.",
            f"{who} liked the {colour} {animal} and gave it some water.",
            f"It was a {adjective} day in the {place}.",
        )
    )
    return start, " " + end


_MIX: tuple[tuple[Callable[[Random], Row], float], ...] = (
    (_copy_string, 10),
    (_copy_phrase, 12),
    (_copy_capitals, 5),
    (_copy_sentence, 14),
    (_copy_marks, 7),
    (_ask_one, 14),
    (_ask_two, 14),
    (_pick_word, 5),
    (_replace_word, 8),
    (_drop_word, 3),
    (_spell, 3),
    (_story, 5),
)
_MAKERS = [maker for maker, _ in _MIX]
_WEIGHTS = [weight for _, weight in _MIX]
