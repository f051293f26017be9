"""ROUGE-L and BLEU: how many words an answer shares with the wanted one.

For comparing variants within one run. Words are runs of letters and digits, every other mark is a
word of its own (BLEU) or left out (ROUGE), so figures are near those of sacrebleu and rouge-score
without being theirs: the one brings five packages, the other rests since 2022 on nltk. It must not
know where texts come from.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from lory_trainer.evaluation.metrics import Metric, averaged

MAX_ORDER = 4
_WORD = re.compile(r"\w+")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")

Counts = tuple[int, ...]
"""Of one row, for BLEU: n-grams that match and n-grams there are, for each n; both lengths."""


def rouge_l(answer: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), case aside."""
    got, want = (_WORD.findall(text.lower()) for text in (answer, wanted))
    if not got or not want:
        return float(got == want)
    common = _longest_common(got, want)
    return 2 * common / (len(got) + len(want))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Of its subsequences, not of runs."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for i, other in enumerate(second, start=1):
            above = row[i]
            row[i] = before + 1 if word == other else max(above, row[i - 1])
            before = above
    return row[-1]


def bleu_counts(answer: str, wanted: str) -> Counts:
    got, want = (_WORD_OR_MARK.findall(text) for text in (answer, wanted))
    pairs = [(_grams(got, n), _grams(want, n)) for n in range(1, MAX_ORDER + 1)]
    matching = (sum((mine & theirs).values()) for mine, theirs in pairs)
    return (*matching, *(sum(mine.values()) for mine, _ in pairs), len(got), len(want))


def bleu(rows: Sequence[Counts]) -> float:
    """Of a corpus (Papineni 2002), between 0 and 1; lengths of n-grams that no answer has are left
    out, so that short answers can be right."""
    sums = [sum(column) for column in zip(*rows, strict=True)]
    matching, there, (num_got, num_want) = sums[:MAX_ORDER], sums[MAX_ORDER:-2], sums[-2:]
    orders = [(m, t) for m, t in zip(matching, there, strict=True) if t]
    if not orders or not all(m for m, _ in orders):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in orders) / len(orders))
    return precision * math.exp(min(0.0, 1 - num_want / num_got))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


ROUGE_L = averaged("rouge_l", rouge_l)
BLEU = Metric("bleu", bleu_counts, bleu, lambda counts: bleu([counts]))
