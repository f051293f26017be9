"""Who goes first: the least worth, by a heap that stays small and agrees with a plain search."""

import random

from lory_server.adapters.ranking import MAX_USES, SLACK, Ranking, worth


def test_among_equals_the_least_recently_used_goes_first() -> None:
    ranking = Ranking()
    for key in ("a", "b", "c", "a"):
        ranking.put(key, 1.0)
    assert [ranking.pop() for _ in range(4)] == ["b", "c", "a", None]


def test_what_is_asked_for_often_dear_or_small_stays_longer() -> None:
    ranking = Ranking()
    for key, uses, cost, num_bytes in (
        ("plain", 2, 1.0, 100), ("often", 3, 1.0, 100), ("dear", 2, 9.0, 100), ("small", 2, 1.0, 50)
    ):  # fmt: skip
        ranking.put(key, worth(uses, cost, num_bytes))
    assert [ranking.pop() for _ in range(4)] == ["plain", "often", "small", "dear"]


def test_nobody_lives_on_the_past_for_ever() -> None:
    """A former favourite goes after as many turnovers as its uses count, and they are bounded."""
    ranking, turnovers = Ranking(), 0
    ranking.put("favourite", worth(1_000_000, 1.0, 1))
    ranking.put("0", worth(1, 1.0, 1))
    while (gone := ranking.pop()) != "favourite":
        assert gone is not None
        turnovers += 1
        ranking.put(str(turnovers), worth(1, 1.0, 1))
    assert turnovers == MAX_USES - 1


def test_what_nobody_asked_for_goes_before_all_that_was() -> None:
    ranking = Ranking()
    ranking.put("asked", worth(1, 0.001, 10**9))
    ranking.put("never", worth(0, 100.0, 1))
    assert ranking.pop() == "never"


def test_what_is_kept_is_passed_over_and_stays_in_its_place() -> None:
    ranking = Ranking()
    for place, key in enumerate("abcd"):
        ranking.put(key, place)
    assert ranking.pop({"a", "b"}) == "c"
    assert ranking.pop({"a", "b", "d"}) is None
    assert [ranking.pop() for _ in range(3)] == ["a", "b", "d"]


def test_it_agrees_with_a_plain_search_and_stays_small() -> None:
    rng, ranking = random.Random(1), Ranking()
    age, clock, places = 0.0, 0, dict[str, tuple[float, int]]()
    for _ in range(20_000):
        key, choice = str(rng.randrange(40)), rng.random()
        if choice < 0.7:
            clock, value = clock + 1, rng.choice((0.5, 1.0, 2.0))
            ranking.put(key, value)
            places[key] = (age + value, clock)
        elif choice < 0.8:
            ranking.discard(key)
            places.pop(key, None)
        else:
            kept = {str(number) for number in range(rng.randrange(5))}
            found = min((k for k in places if k not in kept), key=places.__getitem__, default=None)
            assert ranking.pop(kept) == found
            if found is not None:
                age = max(age, places.pop(found)[0])
        assert len(ranking) == len(places)
        assert (key in ranking) == (key in places)
        assert len(ranking._heap) <= 2 * len(places) + SLACK + 1
