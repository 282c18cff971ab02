"""Facts to remember and prompts that ask for them; plain Python, shared by training and evaluation.

A fact is a sentence that ties a key ("red box", "Tavoren") to a value ("4812", "Lisbon"). Key-value pairs are split by
a hash: training never sees a held-out pair, evaluation asks for nothing else.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo_model.corpus_text import Corpus

HELD_OUT_SHARE = 8  # one pair in eight

# How a prompt asks: in lines of its own, answered by the value; or in running text, answered by the whole sentence.
QUESTION_LINES = "\nQ: {question}\nA:"
RUNNING_TEXT = " {question}"


def _read_words() -> dict[str, list[str]]:
    lines = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    return {name: words.split() for name, words in (line.split(": ") for line in lines)}


_WORDS = _read_words()


def _invented(rng: random.Random, syllables: int) -> str:
    word = "".join(rng.choice(_WORDS["onsets"]) + rng.choice(_WORDS["vowels"]) for _ in range(syllables))
    return word + rng.choice(("", "n", "r", "l", "s"))


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(rng.choice((_WORDS['colours'], _WORDS['looks'])))} {rng.choice(_WORDS['things'])}"


def _person(rng: random.Random) -> str:
    return rng.choice(_WORDS["names"]) if rng.random() < 0.5 else _invented(rng, rng.randint(2, 3)).capitalize()


def _town(rng: random.Random) -> str:
    return rng.choice(_WORDS["towns"]) if rng.random() < 0.5 else _invented(rng, rng.randint(2, 3)).capitalize()


def _country(rng: random.Random) -> str:
    return _invented(rng, 2).capitalize() + rng.choice(("ia", "land", "stan"))


def _pet(rng: random.Random) -> str:
    return f"{rng.choice(_WORDS['animals'])} of {_person(rng)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 4), 100_000))


def _year(rng: random.Random) -> str:
    return str(rng.randrange(1500, 2100))


def _password(rng: random.Random) -> str:
    return _invented(rng, rng.randint(1, 3)) + (str(rng.randrange(100)) if rng.random() < 0.5 else "")


def _phrase(rng: random.Random) -> str:
    """One to three words that need not make sense together."""
    words = [
        rng.choice(_WORDS["words"]) if rng.random() < 0.75 else _invented(rng, rng.randint(1, 3)) for _ in range(3)
    ]
    return " ".join(words[: rng.choice((1, 2, 2, 3))])


def _anything(rng: random.Random) -> str:
    return rng.choice((_number, _password, _person, _town, _thing, _phrase, _year))(rng)


def _one_of(words: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: templates with {key} and {value}, and how to draw both.

    questions: ways to ask, the usual one first.
    """

    statement: str
    questions: tuple[str, ...]
    draw_key: Callable[[random.Random], str]
    draw_value: Callable[[random.Random], str]


BASIC_RELATIONS = (
    Relation("The code of the {key} is {value}.", ("What is the code of the {key}?",), _thing, _number),
    Relation("The price of the {key} is {value}.", ("What is the price of the {key}?",), _thing, _number),
    Relation("The number of {key} is {value}.", ("What is the number of {key}?",), _person, _number),
    Relation("{key} was born in {value}.", ("When was {key} born?",), _person, _year),
    Relation("{key} lives in {value}.", ("Where does {key} live?",), _person, _town),
    Relation("{key} works as a {value}.", ("What does {key} work as?",), _person, _one_of(_WORDS["jobs"])),
    Relation("The password of {key} is {value}.", ("What is the password of {key}?",), _person, _password),
    Relation(
        "The favourite colour of {key} is {value}.",
        ("What is the favourite colour of {key}?",),
        _person,
        _one_of(_WORDS["colours"]),
    ),
    Relation("The {key} is in the {value}.", ("Where is the {key}?",), _thing, _one_of(_WORDS["rooms"])),
    Relation("The capital of {key} is {value}.", ("What is the capital of {key}?",), _country, _town),
    Relation("The {key} is called {value}.", ("What is the {key} called?",), _pet, _person),
    Relation("The secret word is {value}.", ("What is the secret word?",), lambda _: "", _password),
)

# Other words for the same facts, and facts about anything.
ALL_RELATIONS = (
    *BASIC_RELATIONS,
    Relation(
        "The code of the {key} is {value}.",
        ("What is the code of the {key}?", "Which code does the {key} have?", "Tell me the code of the {key}."),
        _thing,
        _number,
    ),
    Relation(
        "{key} lives in {value}.",
        ("Where does {key} live?", "In which town does {key} live?", "Tell me where {key} lives."),
        _person,
        _town,
    ),
    Relation(
        "The {key} belongs to {value}.", ("Who owns the {key}?", "To whom does the {key} belong?"), _thing, _person
    ),
    Relation("{key} bought a {value}.", ("What did {key} buy?",), _person, _thing),
    Relation("{key} likes {value}.", ("What does {key} like?",), _person, _phrase),
    Relation("The {key} of {value} is here.", ("Whose {key} is here?",), _phrase, _person),
    Relation(
        "{key} comes on {value}.",
        ("When does {key} come?", "On which day does {key} come?"),
        _person,
        _one_of(_WORDS["days"]),
    ),
    *(
        Relation(
            f"{owner} {{key}} is {{value}}.",
            (f"What is {asked} {{key}}?", f"Tell me {asked} {{key}}."),
            _phrase,
            _anything,
        )
        for owner, asked in (("The", "the"), ("The", "the"), ("My", "my"), ("Our", "our"), ("Your", "your"))
    ),
)


@dataclass(frozen=True)
class Fact:
    """One sentence to remember and the ways to ask for it. Facts of equal `question` exclude each other."""

    statement: str
    questions: tuple[str, ...]
    answer: str

    @property
    def question(self) -> str:
        """The usual one."""
        return self.questions[0]


def is_held_out(key: str, value: str) -> bool:
    """Whether the pair is kept from training."""
    return zlib.crc32(f"{key}|{value}".encode()) % HELD_OUT_SHARE == 0


def draw_fact(rng: random.Random, relations: tuple[Relation, ...], held_out: bool) -> Fact:
    """A random fact from one side of the training / evaluation split."""
    while True:
        relation = rng.choice(relations)
        key, value = relation.draw_key(rng), relation.draw_value(rng)
        if is_held_out(key, value) == held_out:
            return Fact(
                statement=relation.statement.format(key=key, value=value),
                questions=tuple(question.format(key=key) for question in relation.questions),
                answer=value,
            )


def draw_facts(rng: random.Random, count: int, relations: tuple[Relation, ...], held_out: bool) -> list[Fact]:
    """`count` facts with different questions."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        fact = draw_fact(rng, relations, held_out)
        facts.setdefault(fact.question, fact)
    return list(facts.values())


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt that ends with a question for a fact.

    answer: the value, which must occur in the model's text. reply: exactly what it was trained to write.
    depth: place of the fact's first byte as a share of the prompt, 0 = start.
    """

    text: str
    answer: str
    reply: str
    depth: float


def recall_prompt(
    rng: random.Random, corpus: Corpus, num_tokens: int, depth: float, layout: str = QUESTION_LINES
) -> RecallPrompt:
    """Corpus text with one held-out fact near `depth`, a distractor fact per 200 bytes, and the question at the end.

    Args:
        num_tokens: Wanted length, the leading bos included; the result has at least that and at most a word more.
        depth: 0 .. 1.
        layout: QUESTION_LINES or RUNNING_TEXT.
    """
    asked, *distractors = draw_facts(rng, 1 + num_tokens // 200, ALL_RELATIONS, held_out=True)
    question = layout.format(question=asked.question)
    reply = " " + (asked.statement if layout == RUNNING_TEXT else asked.answer)
    room = num_tokens - len(question) - len(asked.statement)  # bos and the white space stripped below count as one
    room -= sum(len(fact.statement) + 1 for fact in distractors)
    pieces = _words_up_to(room, corpus, rng)
    for fact in distractors:
        pieces.insert(_sentence_start(pieces, rng.random()), fact.statement + " ")
    place = _sentence_start(pieces, depth)
    pieces.insert(place, asked.statement + " ")
    text = "".join(pieces).rstrip() + question
    return RecallPrompt(text, asked.answer, reply, len("".join(pieces[:place])) / len(text))


def recall_prompts(
    corpus: Corpus, num_tokens: int, count: int, seed: int, layout: str = QUESTION_LINES
) -> list[RecallPrompt]:
    """Prompts with the fact's depth spread evenly over the prompt; prompt i depends on the arguments alone."""
    return [
        recall_prompt(
            random.Random(f"recall/{seed}/{num_tokens}/{index}"), corpus, num_tokens, (index + 0.5) / count, layout
        )
        for index in range(count)
    ]


def _words_up_to(num_bytes: int, corpus: Corpus, rng: random.Random) -> list[str]:
    filler = corpus.filler(rng)
    pieces: list[str] = []
    missing = num_bytes
    while len(sentence := next(filler)) < missing:
        pieces.append(sentence)
        missing -= len(sentence)
    end = sentence.find(" ", max(missing, 0))
    return [*pieces, (sentence if end < 0 else sentence[:end]).rstrip(" .") + ". "]


def _sentence_start(pieces: list[str], depth: float) -> int:
    """Index of the piece that begins nearest to the share `depth` of the joined text."""
    wanted = depth * sum(map(len, pieces))
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    return min(range(len(starts)), key=lambda index: abs(starts[index] - wanted))
