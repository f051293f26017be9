"""The tasks that the demo adapters learn: each is a function from a random source to one row.

A row is (text, answer). The prompt of every task is the text and an arrow, with no word of
instruction: the adapter carries the task. This module must not know models or files.
"""

import json
from collections.abc import Callable
from random import Random

import words

Row = tuple[str, str]
TaskMaker = Callable[[Random], Row]

_OPENERS = ("", "", "", "Hi, ", "Hello, ", "Hey, ", "Please help, ", "Good morning, ", "Urgent: ")
_CLOSERS = ("", "", "", " Thanks.", " Please help.", " Any news?", " Thank you!", " What now?")


def _ticket(rng: Random, core: str) -> str:
    """A customer's message around its core sentence."""
    opener = rng.choice(_OPENERS)
    start = core if opener or rng.random() < 0.2 else core[0].upper() + core[1:]
    asks = core.split()[0] in _QUESTION_WORDS
    mark = rng.choice(("?", "?", "") if asks else (".", ".", "", "!"))
    return f"{opener}{start}{mark}{rng.choice(_CLOSERS) if mark else ''}"


_QUESTION_WORDS = ("where", "when", "why", "how", "can", "do", "is", "what")


# -- ticket-router --------------------------------------------------------------------------

# Who or what, and what happened: any two of a pair go together, so that the words carry the label.
_TICKETS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "billing": (
        (
            ("my card", "my credit card", "I", "my bank account"),
            (
                "was charged twice",
                "was charged {number} for one {item}",
                "was billed two times",
                "was billed for order {number}",
                "was charged for a {item} I did not buy",
            ),
        ),
        (
            ("the invoice", "my bill", "the bill for the {item}", "the price on the invoice"),
            ("is wrong", "is too high", "shows a fee of {number}", "does not match the price"),
        ),
        (
            ("I need", "please send", "where can I find", "can I have"),
            ("an invoice for order {number}", "a receipt for the {item}", "my last invoice"),
        ),
        (
            ("the payment", "my payment for the {item}", "my discount code", "the gift card"),
            ("failed", "was taken twice", "did not go through", "was not applied"),
        ),
        (
            ("can I pay", "how do I pay", "I want to pay"),
            ("by card", "by bank transfer", "for the {item} next month", "in two parts"),
        ),
        (("why", "please tell me why"), ("is there a fee on my bill", "was I charged {number}")),
    ),
    "shipping": (
        (
            ("my parcel", "the package", "my order", "order {number}", "the delivery", "my {item}"),
            (
                "has not arrived",
                "is late",
                "never came",
                "is lost",
                "is stuck in {city}",
                "went to the wrong house",
                "is not here yet",
                "should have come on {month} {day}",
            ),
        ),
        (
            ("where is", "when will I get", "please track", "can you track"),
            ("my parcel", "my package", "order {number}", "the {item} I ordered", "my delivery"),
        ),
        (
            ("the courier", "the driver", "the delivery man"),
            ("never came", "left my parcel at the wrong house", "could not find the house"),
        ),
        (
            ("how long does", "how much is", "when is", "what about"),
            ("delivery to {city}", "shipping to {city}", "the delivery of order {number}"),
        ),
        (
            ("do you", "can you"),
            ("ship to {city}", "deliver to {city}", "deliver on {month} {day}"),
        ),
        (("the tracking number", "the tracking link"), ("does not work", "{number} is wrong")),
    ),
    "returns": (
        (
            ("I want to", "I would like to", "how do I", "can I", "please let me"),
            (
                "return the {item}",
                "send the {item} back",
                "send back the {colour} {item}",
                "get a refund for order {number}",
                "exchange the {item}",
                "swap the {item} for a {colour} one",
                "get my money back",
            ),
        ),
        (
            ("the {item}", "the {colour} {item}", "this {item}"),
            ("does not fit", "is the wrong size", "is the wrong colour", "is not what I ordered"),
        ),
        (("I need", "please send", "where is"), ("a return label", "my refund", "the return form")),
        (("you sent", "I got", "I received"), ("the wrong {item}", "the wrong colour")),
        (("I changed my mind about", "I do not want"), ("the {item}", "order {number}")),
        (("is it too late", "how much time do I have"), ("to return it", "to send it back")),
    ),
    "technical": (
        (
            ("the app", "my {item}", "the {item}", "the website", "the screen", "the program"),
            (
                "does not turn on",
                "crashes",
                "keeps crashing",
                "stopped working",
                "is frozen",
                "shows error {number}",
                "will not start",
                "is very slow",
                "makes a strange noise",
                "gets too hot",
                "will not connect to wifi",
                "does not load",
            ),
        ),
        (
            ("how do I", "can you help me", "I can not"),
            ("reset the {item}", "install the app", "connect the {item}", "update the {item}"),
        ),
        (
            ("the battery", "the button", "the wifi", "the sound"),
            ("does not work", "of the {item} is dead", "stopped working", "of the {item} is bad"),
        ),
        (("I see", "I get", "there is"), ("error {number}", "a bug in the app", "a black screen")),
        (("the update", "the new version"), ("broke my {item}", "does not install", "crashes")),
    ),
    "account": (
        (
            ("I forgot", "I lost", "please reset", "how do I change", "I want to change"),
            ("my password", "my user name", "my login", "my email address", "my profile"),
        ),
        (
            ("I can not", "I am not able to", "how do I", "why can I not"),
            ("log in", "sign in", "log in with {email}", "open my account", "sign up"),
        ),
        (
            ("please", "can you", "I want to", "how do I"),
            ("delete my account", "close my account", "close the account of {name}"),
        ),
        (
            ("my account", "my profile", "my login"),
            ("is locked", "was hacked", "is blocked", "has the wrong name", "is gone"),
        ),
        (
            ("the password reset mail", "my login code", "the code for my account"),
            ("never came", "does not work", "is not in my mail"),
        ),
        (("someone else", "a stranger"), ("uses my account", "knows my password")),
    ),
}
_SHORTER = (
    ("can not", "can't"),
    ("does not", "doesn't"),
    ("is not", "isn't"),
    ("will not", "won't"),
    ("I would", "I'd"),
    ("has not", "hasn't"),
)


def _shorten(text: str) -> str:
    for long, short in _SHORTER:
        text = text.replace(long, short)
    return text


def ticket_router(rng: Random) -> Row:
    label = rng.choice(sorted(_TICKETS))
    firsts, seconds = rng.choice(_TICKETS[label])
    core = f"{rng.choice(firsts)} {rng.choice(seconds)}".format(
        number=words.digits(rng, 2, 4),
        item=rng.choice(words.ITEMS),
        city=rng.choice(words.CITIES),
        colour=rng.choice(words.COLOURS),
        name=words.first_name(rng),
        email=words.email(rng),
        month=rng.choice(words.MONTHS),
        day=rng.randint(1, 28),
    )
    return _ticket(rng, _shorten(core) if rng.random() < 0.5 else core), label


# -- ticket-json ----------------------------------------------------------------------------

_ISSUES = (
    "late",
    "broken",
    "missing",
    "too small",
    "too big",
    "scratched",
    "wet",
    "faulty",
    "dirty",
)
_JSON_FORMS = (
    "{name} here, my {item} is {issue}, order {order}.",
    "Hi, I am {name}. The {item} from order {order} is {issue}.",
    "Order {order}: the {item} for {name} is {issue}.",
    "My name is {name} and my {item} is {issue}. Order {order}.",
    "The {item} is {issue}. Order {order}, {name}.",
    "Hello, order {order} came today but the {item} is {issue}. {name}",
    "{name} says the {item} of order {order} is {issue}.",
    "I ordered a {item} and it is {issue}. It is order {order}. Regards, {name}",
    "{name}, order {order}: my {item} is {issue}!",
    "Why is my {item} {issue}? I am {name}, order {order}.",
    "The {item} I got is {issue}. My name is {name}, my order is {order}.",
    "Order {order} from {name}. Item: {item}. Problem: {issue}.",
    "My {item} (order {order}) is {issue}. Thanks, {name}.",
    "Hi, {name} here. My {item} is {issue}. The order number is {order}.",
)


def ticket_json(rng: Random) -> Row:
    facts = {
        "name": words.full_name(rng) if rng.random() < 0.6 else words.first_name(rng),
        "order": str(rng.randint(100, 99999)),
        "item": rng.choice(words.ITEMS),
        "issue": rng.choice(_ISSUES),
    }
    return rng.choice(_JSON_FORMS).format(**facts), json.dumps(facts)


# -- sentiment ------------------------------------------------------------------------------

_RATED = ("food", "room", "service", "coffee", "staff", "hotel", "price", "film", "place", "trip")
_OPINIONS = (
    "the {item} is {adjective}",
    "this {item} was {adjective}",
    "what a {adjective} {item}",
    "the service in {city} was {adjective}",
    "{adjective} {item}, {adverb} {adjective}",
    "I think the {colour} {item} is {adjective}",
    "my {item} from {city} is {adverb} {adjective}",
    "{name} was {adjective} to me",
    "the food was {adverb} {adjective}",
    "a {adjective} day in {city}",
    "the {thing} was {adjective} and {second}",
    "{adjective} {thing} and {second} {thing2}",
    "{adjective} {thing}",
    "this is {adjective}",
    "the {thing} in {city} is {adjective}",
)
_GOOD_WHOLE = (
    "I love this {item}",
    "I would buy the {item} again",
    "best {item} I ever had",
    "the {item} works like a charm",
    "thank you {name}, I am so happy",
    "five stars for the {item}",
    "I love it",
    "best {thing} in {city}",
    "best {item} in town",
    "I love the {thing} in {city}",
    "{name} loves the {item}",
    "I am happy with my {item}",
    "I will come back to {city}",
)
_BAD_WHOLE = (
    "I hate this {item}",
    "never buy this {item}",
    "worst {item} I ever had",
    "the {item} broke after one day",
    "I want my money back, {name}",
    "one star for the {item}",
    "I hate it",
    "worst {thing} in {city}",
    "worst {item} in town",
    "I hate the {thing} in {city}",
    "{name} hates the {item}",
    "I am not happy with my {item}",
    "I will never come back to {city}",
)


def sentiment(rng: Random) -> Row:
    label = rng.choice(("positive", "negative"))
    good = label == "positive"
    form = rng.choice((rng.choice(_OPINIONS), rng.choice(_GOOD_WHOLE if good else _BAD_WHOLE)))
    text = form.format(
        item=rng.choice(words.ITEMS),
        city=rng.choice(words.CITIES),
        colour=rng.choice(words.COLOURS),
        name=words.first_name(rng),
        adverb=rng.choice(("very", "really", "so", "just", "simply")),
        adjective=rng.choice(words.PRAISE if good else words.BLAME),
        second=rng.choice(words.PRAISE if good else words.BLAME),
        thing=rng.choice(_RATED),
        thing2=rng.choice(_RATED),
    )
    return text[0].upper() + text[1:] + rng.choice((".", "!", "")), label


# -- redact ---------------------------------------------------------------------------------

_PRIVATE = (
    "Call {name} at {phone}.",
    "Please write to {email} before {day}.",
    "My name is {name}, my mail is {email}.",
    "{name} can be reached at {phone} or {email}.",
    "I met {name} at the {place} on {day}.",
    "Send the {item} to {name}, phone {phone}.",
    "The {colour} {item} belongs to {name}.",
    "Hello, this is {name}. My number is {phone}.",
    "Ask {name} or {name2} about the {item}.",
    "{name} paid for the {item} with a card.",
    "The mail from {email} was about the {item}.",
    "We need the {item} by {day}, call {phone}.",
    "{name} told {name2} to call {phone}.",
    "Please tell {name} that the {item} is ready.",
    "Is {name} at the {place} on {day}?",
    "Hi {name}, thanks for the {colour} {item}.",
    "The phone of {name} is {phone}, not {phone2}.",
    "{email} and {email2} did not answer.",
    "On {day} {name} and {name2} went to the {place}.",
    "Contact {name} at {email} or {phone}.",
    "Contact {email} or {phone}.",
    "Please call {name} on {phone} or write to {email}.",
    "{name}, {email}, {phone}",
    "I am {name} and this is my {item}.",
)


def redact(rng: Random) -> Row:
    form = rng.choice(_PRIVATE)
    plain = {
        "place": rng.choice(words.PLACES),
        "item": rng.choice(words.ITEMS),
        "colour": rng.choice(words.COLOURS),
        "day": rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")),
    }
    secret = {
        "name": words.full_name(rng) if rng.random() < 0.5 else words.first_name(rng),
        "name2": words.first_name(rng),
        "phone": words.phone(rng),
        "phone2": words.phone(rng),
        "email": words.email(rng),
        "email2": words.email(rng),
    }
    masks = {slot: f"[{slot.rstrip('2').upper()}]" for slot in secret}
    return form.format(**plain, **secret), form.format(**plain, **masks)


# -- text-to-sql ----------------------------------------------------------------------------

_TABLES = ("orders", "customers", "products", "invoices", "users", "tickets", "payments", "books")
_ASKS = (
    ("How many {table}", "SELECT COUNT(*) FROM {table}"),
    ("Count all {table}", "SELECT COUNT(*) FROM {table}"),
    ("Show all {table}", "SELECT * FROM {table}"),
    ("List the {table}", "SELECT * FROM {table}"),
    ("Average price of {table}", "SELECT AVG(price) FROM {table}"),
    ("Highest price of {table}", "SELECT MAX(price) FROM {table}"),
    ("Names of {table}", "SELECT name FROM {table}"),
)
_FILTERS = (
    ("from {country}", "country = '{country}'"),
    ("in {year}", "year = {year}"),
    ("in {city}", "city = '{city}'"),
    ("over {number}", "price > {number}"),
    ("under {number}", "price < {number}"),
    ("by {name}", "name = '{name}'"),
)


def text_to_sql(rng: Random) -> Row:
    ask, select = rng.choice(_ASKS)
    filters = rng.sample(_FILTERS, rng.choice((0, 1, 1, 1, 2, 2)))
    question = " ".join([ask, *(said for said, _ in filters)])
    where = " AND ".join(condition for _, condition in filters)
    values = {
        "table": rng.choice(_TABLES),
        "country": rng.choice(words.COUNTRIES),
        "city": rng.choice(words.CITIES),
        "year": rng.randint(1990, 2029),
        "number": rng.randint(2, 999),
        "name": words.first_name(rng),
    }
    query = select + (f" WHERE {where}" if where else "") + ";"
    mark = "?" if ask.startswith("How") else ""
    return question.format(**values) + mark, query.format(**values)


# -- iso-date -------------------------------------------------------------------------------

_DATE_FORMS = (
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "{month} {day} {year}",
    "{short} {day}, {year}",
    "{day} {short} {year}",
    "{month} {day}{th}, {year}",
    "the {day}{th} of {month} {year}",
)
_AROUND_DATES = (
    "{date}",
    "{date}",
    "We meet on {date}.",
    "The invoice is due on {date}.",
    "Born on {date} in {city}.",
    "The {item} arrives on {date}.",
    "{name} starts work on {date}.",
    "It was signed on {date}.",
)


def iso_date(rng: Random) -> Row:
    day = rng.randint(1, rng.choice((9, 28)))  # the zero before a single figure is the hard part
    month, year = rng.randint(1, 12), rng.randint(1950, 2049)
    name = words.MONTHS[month - 1]
    ending = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    date = rng.choice(_DATE_FORMS).format(day=day, month=name, short=name[:3], year=year, th=ending)
    text = rng.choice(_AROUND_DATES).format(
        date=date,
        city=rng.choice(words.CITIES),
        item=rng.choice(words.ITEMS),
        name=words.first_name(rng),
    )
    return text[0].upper() + text[1:], f"{year}-{month:02d}-{day:02d}"


# -- polite ---------------------------------------------------------------------------------

_BLUNT = (
    ("give me the {thing}", "Could you please give me the {thing}?"),
    ("gimme the {thing}", "Could you please give me the {thing}?"),
    ("send the {thing} to {who}", "Could you please send the {thing} to {who}?"),
    ("i want a {thing}", "I would like a {thing}, please."),
    ("i want the {thing} now", "I would like the {thing} soon, please."),
    ("where is my {thing}", "Could you please tell me where my {thing} is?"),
    ("wheres the {thing}", "Could you please tell me where the {thing} is?"),
    ("fix the {thing}", "Could you please fix the {thing}?"),
    ("fix my {thing} asap", "Could you please fix my {thing} as soon as possible?"),
    ("call {who}", "Could you please call {who}?"),
    ("tell {who} about the {thing}", "Could you please tell {who} about the {thing}?"),
    ("no {thing} for {who}", "I am afraid there is no {thing} for {who}."),
    ("hurry up with the {thing}", "Please let me know when the {thing} is ready."),
    ("{who} is wrong", "I am afraid {who} may be mistaken."),
)


_WHICH = (*words.COLOURS, "new", "old", "big", "small", "other")


def polite(rng: Random) -> Row:
    said, meant = rng.choice(_BLUNT)
    thing = rng.choice(words.ITEMS) if rng.random() < 0.6 else words.made_up_word(rng)
    if rng.random() < 0.5:
        thing = f"{rng.choice(_WHICH)} {thing}"
    who = words.first_name(rng)
    mark = rng.choice(("", "", "!", "!!"))
    return said.format(thing=thing, who=who) + mark, meant.format(thing=thing, who=who)


# -- shout ----------------------------------------------------------------------------------


def shout(rng: Random) -> Row:
    text = words.phrase(rng, 1, 9)
    if rng.random() < 0.5:
        text = f"{words.first_name(rng)} {text}"
    return text + rng.choice(("", ".")), text.upper() + "!"


TASKS: dict[str, TaskMaker] = {
    "ticket-router": ticket_router,
    "ticket-json": ticket_json,
    "sentiment": sentiment,
    "redact": redact,
    "text-to-sql": text_to_sql,
    "iso-date": iso_date,
    "polite": polite,
    "shout": shout,
}
