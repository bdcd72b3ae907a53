"""Retrieval tasks hidden in text: what a model must find again further back.

A task states facts in one or several places and asks for them later. `make_sequence` scatters many of them over a piece of
text, so that every sequence teaches retrieval over all distances up to its length.
"""

import random
from dataclasses import dataclass
from typing import Callable, List, Tuple

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
ADJECTIVES = (
    *("magic", "secret", "lucky", "special", "hidden", "golden"),
    *("silent", "final", "second", "winter", "broken", "purple"),
)


@dataclass(frozen=True)
class Statement:
    """Text to be put somewhere. The model is asked for `answer`, which ends it; "" if this only tells."""

    text: str
    answer: str = ""


# A task: its statements in the order in which they must come.
Task = List[Statement]


def name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))


def number(rng: random.Random) -> str:
    return "".join(rng.choices(DIGITS, k=rng.randint(4, 8)))


def fact(adjective: str, key: str) -> str:
    return f"The {adjective} number of {key} is"


def told(adjective: str, key: str, value: str) -> str:
    return f"\n{fact(adjective, key)} {value}.\n"


def asked(adjective: str, key: str) -> str:
    return f"\nWhat is the {adjective} number of {key}? {fact(adjective, key)}"


def needle(rng: random.Random) -> Task:
    """A number to remember, asked for once or several times."""
    adjective, key, value = rng.choice(ADJECTIVES), name(rng), number(rng)
    return [Statement(told(adjective, key, value))] + [
        Statement(asked(adjective, key), f" {value}.\n")
        for _ in range(rng.randint(1, 3))
    ]


def worded_needle(rng: random.Random) -> Task:
    """The same in other words: those of the question are not those of the answer."""
    adjective, value = rng.choice(ADJECTIVES), number(rng)
    key = f"{name(rng)}-{name(rng)}"
    asks = f"\nWhat is the {adjective} number for {key} mentioned in the text? It is"
    return [
        Statement(f"\nOne of the {adjective} numbers for {key} is: {value}.\n"),
        Statement(asks, f" {value}.\n"),
    ]


def multi_needle(rng: random.Random) -> Task:
    """Several numbers under one adjective; all are asked for together."""
    adjective = rng.choice(ADJECTIVES)
    values = {name(rng): number(rng) for _ in range(rng.randint(2, 4))}
    tells = [Statement(told(adjective, k, v)) for k, v in values.items()]
    order = list(values.items())
    rng.shuffle(order)
    return tells + [
        Statement(f"\nAgain: {fact(adjective, key)}", f" {value}.\n")
        for key, value in order
    ]


def alike_needles(rng: random.Random) -> Task:
    """Up to eight numbers of one name, told alike but for an adjective, by which some of them are asked for."""
    key, adjectives = name(rng), rng.sample(ADJECTIVES, rng.randint(2, 8))
    values = {adjective: number(rng) for adjective in adjectives}
    return [Statement(told(adjective, key, v)) for adjective, v in values.items()] + [
        Statement(asked(adjective, key), f" {values[adjective]}.\n")
        for adjective in rng.sample(adjectives, 2)
    ]


def key_value(rng: random.Random) -> Task:
    """Lines `key = value`, one of which is asked for."""
    lines = {name(rng): number(rng) for _ in range(rng.randint(4, 16))}
    table = "".join(f"{key} = {value}\n" for key, value in lines.items())
    key = rng.choice(list(lines))
    return [Statement(f"\n{table}"), Statement(f"\n{key} =", f" {lines[key]}\n")]


def copying(rng: random.Random) -> Task:
    """A random string that comes again; its beginning says which."""
    text = "".join(rng.choices(LETTERS + DIGITS, k=rng.randint(24, 64)))
    return [Statement(f"\n<{text}>\n"), Statement(f"\n<{text[:10]}", f"{text[10:]}>\n")]


def few_shot(rng: random.Random) -> Task:
    """A table of words and what they stand for, that is used again and again."""
    words = [name(rng) for _ in range(4)]
    meanings = {word: rng.choice(LETTERS) + rng.choice(DIGITS) for word in words}
    shots = [rng.choice(words) for _ in range(6)]
    return [
        Statement("\n" + "".join(f"{w} -> {meanings[w]}; " for w in words)),
        Statement(
            "\n"
            + "".join(f"{w} -> {meanings[w]}; " for w in shots[:-1])
            + f"{shots[-1]} ->",
            f" {meanings[shots[-1]]};\n",
        ),
    ]


TASKS: Tuple[Callable[[random.Random], Task], ...] = (
    needle,
    needle,
    worded_needle,
    multi_needle,
    alike_needles,
    key_value,
    copying,
    few_shot,
)


def make_sequence(
    rng: random.Random, text: bytes, length: int, every: int = 700
) -> Tuple[bytes, bytearray]:
    """A piece of text with tasks in it.

    Args:
        rng: decides everything.
        text: where the piece is taken from; longer than `length` bytes.
        length: of the sequence, in bytes.
        every: there is one task for about so many bytes.

    Returns:
        The sequence, and a mask of it: 1 where a byte is part of an answer.
    """
    places: List[Tuple[float, Statement]] = []
    room = length // 2  # no more than half is tasks
    for _ in range(max(1, length // every)):
        task = rng.choice(TASKS)(rng)
        room -= sum(len(s.text) + len(s.answer) for s in task)
        if room < 0:
            break
        places += zip(sorted(rng.random() for _ in task), task)
    places.sort(key=lambda place: place[0])

    filler = length - sum(len(s.text) + len(s.answer) for _, s in places)
    begin = rng.randrange(len(text) - filler)
    parts, mask, done = [], bytearray(), 0
    for place, statement in places:
        cut = int(place * filler)
        parts += [
            text[begin + done : begin + cut],
            statement.text.encode(),
            statement.answer.encode(),
        ]
        mask += bytes(cut - done + len(statement.text))
        mask += b"\x01" * len(statement.answer)
        done = cut
    parts.append(text[begin + done : begin + filler])
    mask += bytes(filler - done)
    return b"".join(parts), mask
