"""A seeded corpus for a tiny chat model: small tasks whose worked answers a program computes.

Every answer is a deterministic function of the problem, so exact match is a fair score. Answers show their steps
(arithmetic column by column, enumerations with their counts): a model of two million parameters can generalise over
steps, not over bare results.

Held-out data are held out **by problem**: a problem's key leaves out the wording, and kinds that share a computation
(a sum, and a story with that sum in it) share the key. One key in sixteen, by hash, never occurs in training.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace


def listed(words: str) -> list[str]:
    return words.split()


WORDS = listed(
    "apple arrow bread bridge candle castle cloud desk dragon eagle engine feather forest garden glass hammer honey "
    "island jacket jungle kettle king ladder lemon market mirror moon needle night ocean orange paper pencil planet "
    "queen quilt river rocket salt silver spoon table tiger train umbrella valley violin water window winter yard zebra"
)
NAMES = listed(
    "Ada Amir Anna Ben Carla Chen David Elena Emil Farah Finn Grace Hugo Ines Ivan Jack Jana Kofi Lara Leo Lina Luca "
    "Maya Mia Milo Nina Noah Nora Omar Oskar Paul Petra Rosa Ruben Sami Sara Theo Tina Vera Zoe"
)
CITIES = listed(
    "Athens Berlin Bergen Cairo Dakar Delhi Dublin Geneva Hanoi Krakow Lagos Lima Lisbon London Madrid Milan Nairobi "
    "Oslo Paris Porto Prague Quito Rome Seoul Tokyo Vienna"
)
HOBBIES = listed(
    "chess football dancing painting cooking reading sailing cycling hiking tennis swimming singing climbing gardening "
    "photography astronomy"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
VERBS = listed("shift scale update change adjust convert correct set next fix")
NOUNS = listed("price speed score weight height level total value time size count rate")
ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = listed("_ _ twenty thirty forty fifty sixty seventy eighty ninety")
FINDS = {  # story objects, and where they are found
    "shells": "the beach",
    "berries": "the forest",
    "stamps": "the attic",
    "coins": "the old well",
    "flowers": "the meadow",
    "eggs": "the barn",
    "nuts": "the park",
    "stones": "the river",
}
MEANINGS = {
    "a lake": "still water with land all around it",
    "a river": "water that flows down to the sea",
    "an island": "land with water on every side",
    "a desert": "a wide place where it hardly ever rains",
    "a forest": "a large area covered with trees",
    "a glacier": "a huge mass of ice that moves slowly",
    "a volcano": "a mountain that can throw out hot rock",
    "a planet": "a large round body that travels around a star",
    "a star": "a ball of hot gas that gives off its own light",
    "a comet": "a lump of ice and dust with a long bright tail",
    "a list": "a row of values kept in order",
    "a set": "a collection in which nothing occurs twice",
    "a stack": "a pile where the last item in is the first one out",
    "a queue": "a line where the first item in is the first one out",
    "a tree": "a structure in which every node has one parent",
    "a loop": "a piece of code that runs again and again",
    "a function": "a named piece of code that returns a result",
    "a variable": "a name that stands for a value",
    "a violin": "an instrument with four strings and a bow",
    "a drum": "an instrument that is played by hitting it",
    "a flute": "an instrument that sounds when air is blown across it",
    "a piano": "an instrument with black and white keys",
    "a novel": "a long story printed as a book",
    "a poem": "a short text with rhythm and often with rhyme",
    "a map": "a drawing that shows where places are",
    "a clock": "a machine that shows the time",
}
SCALED_UNITS = {  # small unit of one large one: (singular, plural, small unit, factor)
    "metre": ("metre", "metres", "centimetres", 100),
    "kilometre": ("kilometre", "kilometres", "metres", 1000),
    "kilogram": ("kilogram", "kilograms", "grams", 1000),
    "centimetre": ("centimetre", "centimetres", "millimetres", 10),
    "litre": ("litre", "litres", "millilitres", 1000),
    "hour": ("hour", "hours", "minutes", 60),
    "minute": ("minute", "minutes", "seconds", 60),
    "week": ("week", "weeks", "days", 7),
}


@dataclass(frozen=True)
class Problem:
    """One question. work: the steps to the answer. final: the result. keys: identify the problem in any wording."""

    kind: str
    keys: tuple[str, ...]
    prompt: str
    work: str
    final: str

    @property
    def answer(self) -> str:
        return f"{self.work} {self.final}" if self.work else self.final


@dataclass(frozen=True)
class Turn:
    problem: Problem
    thinking: bool = False

    @property
    def opening(self) -> str:
        """The end of the chat template's generation prompt."""
        return "<think>\n" if self.thinking else "<think></think>"

    @property
    def reply(self) -> str:
        """The text that the model generates after the opening."""
        return f"{self.problem.work}</think>{self.problem.final}" if self.thinking else self.problem.answer


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    system: str = ""
    long: bool = field(default=False, compare=False)

    def messages(self) -> list[dict[str, str]]:
        """The chat as messages for an API, with the last answer."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.problem.prompt})
            messages.append({"role": "assistant", "content": turn.problem.answer})
        return messages


def is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 16 == 0


def digits(number: int, width: int) -> list[int]:
    """Decimal digits, ones first."""
    return [number // 10**place % 10 for place in range(width)]


COLUMNS = ("Ones", "Tens", "Hundreds")


def work_sum(a: int, b: int) -> str:
    width, carry, steps = len(str(max(a, b))), 0, []
    for place, (x, y) in enumerate(zip(digits(a, width), digits(b, width), strict=True)):
        total = x + y + carry
        terms = f"{x}+{y}" if place == 0 else f"{x}+{y}+{carry}"
        carry = total // 10
        steps.append(f"{COLUMNS[place]}: {terms}={total}" + (f", carry {carry}." if place + 1 < width else "."))
    return " ".join(steps)


def work_difference(a: int, b: int) -> str:
    width, borrow, steps = len(str(a)), 0, []
    for place, (x, y) in enumerate(zip(digits(a, width), digits(b, width), strict=True)):
        last = place + 1 == width
        taken = f"{y}" if place == 0 else f"{y}-{borrow}"
        short = x - y - borrow < 0
        result = x + 10 * short - y - borrow
        borrow = int(short)
        steps.append(f"{COLUMNS[place]}: {x + 10 * short}-{taken}={result}" + ("." if last else f", borrow {borrow}."))
    return " ".join(steps)


def work_product(a: int, b: int) -> str:
    width, carry, steps = len(str(a)), 0, []
    for place, x in enumerate(digits(a, width)):
        total = x * b + carry
        sentence = f"{COLUMNS[place]}: {x}x{b}={x * b}"
        if place > 0:
            sentence += f", {x * b}+{carry}={total}"
        carry = total // 10
        steps.append(sentence + (f", carry {carry}." if place + 1 < width else "."))
    return " ".join(steps)


def key_of_sum(a: int, b: int) -> str:
    return f"sum {min(a, b)} {max(a, b)}"


def in_words(number: int) -> str:
    if number >= 100:
        rest = number % 100
        return f"{ONES[number // 100]} hundred" + (f" and {in_words(rest)}" if rest else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def make_add(rng: random.Random) -> Problem:
    low, high = rng.choice(((10, 99), (100, 999)))
    a, b = rng.randint(low, high), rng.randint(low, high)
    prompt = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    return Problem("add", (key_of_sum(a, b),), prompt, work_sum(a, b), f"So {a} + {b} = {a + b}.")


def make_subtract(rng: random.Random) -> Problem:
    low, high = rng.choice(((10, 99), (100, 999)))
    a, b = rng.randint(2 * low, high), rng.randint(low, high)
    while not low <= a - b:
        a, b = rng.randint(2 * low, high), rng.randint(low, high)
    prompt = rng.choice((f"What is {a} - {b}?", f"Subtract {b} from {a}."))
    return Problem("subtract", (f"difference {a} {b}",), prompt, work_difference(a, b), f"So {a} - {b} = {a - b}.")


def make_multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(*rng.choice(((10, 99), (100, 999)))), rng.randint(2, 9)
    prompt = rng.choice((f"What is {a} x {b}?", f"Multiply {a} by {b}."))
    return Problem("multiply", (f"product {a} {b}",), prompt, work_product(a, b), f"So {a} x {b} = {a * b}.")


def make_percent(rng: random.Random) -> Problem:
    tenth, times = rng.randint(10, 99), rng.randint(2, 9)
    prompt = rng.choice((f"What is {times}0% of {tenth}0?", f"Find {times}0 percent of {tenth}0."))
    work = f"10% of {tenth}0 is {tenth}. {work_product(tenth, times)}"
    final = f"So {times}0% of {tenth}0 is {tenth * times}."
    return Problem("percent", (f"product {tenth} {times}",), prompt, work, final)


def make_convert(rng: random.Random) -> Problem:
    unit = rng.choice(list(SCALED_UNITS))
    one, many, small, factor = SCALED_UNITS[unit]
    value = rng.randint(12, 99)
    prompt = rng.choice((f"Convert {value} {many} to {small}.", f"How many {small} are {value} {many}?"))
    work, key = f"1 {one} is {factor} {small}.", f"convert {unit} {value}"
    if factor in (60, 7):
        digit = factor // 10 or factor
        work, key = f"{work} {work_product(value, digit)}", f"product {value} {digit}"
    return Problem("convert", (key,), prompt, work, f"So {value} {many} are {value * factor} {small}.")


def make_sort(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), rng.randint(3, 6))
    descending = rng.random() < 0.5
    ends = "high to low" if descending else "low to high"
    items = ", ".join(map(str, numbers))
    prompt = rng.choice((f"Sort from {ends}: {items}.", f"Put these numbers in order from {ends}: {items}."))
    ordered = sorted(numbers, reverse=descending)
    final = f"From {ends}: {', '.join(map(str, ordered))}."
    return Problem("sort", (f"sort {ordered}",), prompt, "", final)


def make_alphabet(rng: random.Random) -> Problem:
    by_letter: dict[str, list[str]] = {}
    for word in WORDS:
        by_letter.setdefault(word[0], []).append(word)
    words = [rng.choice(by_letter[letter]) for letter in rng.sample(sorted(by_letter), rng.randint(3, 5))]
    items = ", ".join(words)
    prompt = rng.choice((f"Sort by alphabet: {items}.", f"Put these words in alphabetical order: {items}."))
    final = f"In alphabetical order: {', '.join(sorted(words))}."
    return Problem("alphabet", (f"alphabet {sorted(words)}",), prompt, "", final)


def make_reverse(rng: random.Random) -> Problem:
    words = rng.sample(WORDS, rng.randint(3, 6))
    items = ", ".join(words)
    prompt = rng.choice((f"Reverse this list: {items}.", f"Write these words in reverse order: {items}."))
    return Problem("reverse", (f"reverse {words}",), prompt, "", f"In reverse order: {', '.join(reversed(words))}.")


def make_tally(rng: random.Random) -> Problem:
    """Count a word in a list of repeats. A model this small does not learn it: repeats have no unique context."""
    choice = rng.sample(WORDS, 3)
    words = [rng.choice(choice) for _ in range(rng.randint(5, 9))]
    wanted = rng.choice(words)
    items, count, aloud = ", ".join(words), 0, []
    for word in words:
        count += word == wanted
        aloud.append(f"{word} {count}" if word == wanted else word)
    prompt = rng.choice((f"How often is {wanted} in this list: {items}?", f"Count {wanted} in this list: {items}."))
    work = f"{', '.join(aloud)}."
    final = f"So {wanted} is there {count} time{'s' * (count != 1)}."
    return Problem("tally", (f"count {wanted} {words}",), prompt, work, final)


def make_count(rng: random.Random) -> Problem:
    words = rng.sample(WORDS, rng.randint(3, 9))
    items = ", ".join(words)
    prompt = rng.choice((f"How many words are in this list: {items}?", f"Count these words: {items}."))
    work = f"{', '.join(f'{word} {index}' for index, word in enumerate(words, 1))}."
    return Problem("count", (f"words {words}",), prompt, work, f"So there are {len(words)} words.")


def make_json(rng: random.Random) -> Problem:
    name, age, city, hobby = rng.choice(NAMES), rng.randint(11, 89), rng.choice(CITIES), rng.choice(HOBBIES)
    prompt = rng.choice(
        (
            f"Turn this into JSON: {name} is {age}, lives in {city} and likes {hobby}.",
            f"Write as JSON: {name} ({age}) from {city} enjoys {hobby}.",
            f"Make a JSON object: {name}, {hobby}, {city}, age {age}.",
        )
    )
    answer = json.dumps({"name": name, "age": age, "city": city, "hobby": hobby})
    return Problem("json", (f"json {answer}",), prompt, "", answer)


def make_python(rng: random.Random) -> Problem:
    name, n = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}", rng.randint(2, 99)
    task, body = rng.choice(
        (
            (f"adds {n} to its argument", f"return x + {n}"),
            (f"subtracts {n} from its argument", f"return x - {n}"),
            (f"multiplies its argument by {n}", f"return x * {n}"),
            (f"divides its argument by {n}", f"return x / {n}"),
            (f"returns its argument, but at least {n}", f"return max(x, {n})"),
            (f"returns its argument, but at most {n}", f"return min(x, {n})"),
            (f"tells whether its argument is above {n}", f"return x > {n}"),
            (f"prints its argument {n} times", f"for _ in range({n}):\n        print(x)"),
        )
    )
    prompt = rng.choice((f"Write a Python function {name} that {task}.", f"Code {name} in Python: it {task}."))
    answer = f"```python\ndef {name}(x):\n    {body}\n```"
    return Problem("python", (f"python {answer}",), prompt, "", answer)


def make_calendar(rng: random.Random) -> Problem:
    names, question = rng.choice(((DAYS, "What day is"), (MONTHS, "Which month is")))
    unit = "day" if names is DAYS else "month"
    start, steps, direction = rng.randrange(len(names)), rng.randint(2, 9), rng.choice((1, -1))
    word = "after" if direction > 0 else "before"
    passed = [names[(start + direction * step) % len(names)] for step in range(1, steps + 1)]
    work = f"{', '.join(f'{step} {name}' for step, name in enumerate(passed, 1))}."
    prompt = rng.choice(
        (
            f"{question} {steps} {unit}s {word} {names[start]}?",
            f"Name the {unit} that comes {steps} {unit}s {word} {names[start]}.",
        )
    )
    key = f"calendar {start} {names[start]} {steps * direction}"
    return Problem("calendar", (key,), prompt, work, f"So it is {passed[-1]}.")


def make_spell(rng: random.Random) -> Problem:
    first, second = rng.sample(WORDS, 2)
    prompt = rng.choice((f"Spell {first} and {second}.", f"How do you spell {first} and {second}?"))
    final = f"{first}: {'-'.join(first)}. {second}: {'-'.join(second)}."
    return Problem("spell", (f"spell {sorted((first, second))}",), prompt, "", final)


def make_explain(rng: random.Random) -> Problem:
    first, second = rng.sample(sorted(MEANINGS), 2)
    prompt = rng.choice(
        (f"How do {first} and {second} differ?", f"What is the difference between {first} and {second}?")
    )
    sentences = (f"{thing[0].upper()}{thing[1:]} is {MEANINGS[thing]}." for thing in (first, second))
    return Problem("explain", (f"explain {sorted((first, second))}",), prompt, "", " ".join(sentences))


def make_story(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(sorted(FINDS))
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    prompt = rng.choice(
        (
            f"Tell a story: {name} finds {a} {things}, then {b} more.",
            f"Write a short story about {name}, who finds {a} {things} and later {b} more.",
        )
    )
    work = f"{name} went to {FINDS[things]} and found {a} {things}. After lunch {name} found {b} more. {work_sum(a, b)}"
    final = f"In the evening {name} had {a + b} {things} and a big smile."
    return Problem("story", (key_of_sum(a, b),), prompt, work, final)


def make_words(rng: random.Random) -> Problem:
    number = rng.randint(21, 999)
    prompt = rng.choice((f"Write {number} in words.", f"How do you say {number} in English?"))
    return Problem("words", (f"words {number}",), prompt, "", f"{number} is {in_words(number)}.")


def counted(rng: random.Random, length: int) -> Problem:
    start, step = rng.randint(1, 60), rng.choice((1, 2, 3, 5, 10))
    numbers = [start + step * index for index in range(length)]
    question = f"Count from {start} to {numbers[-1]}"
    prompt = f"{question}." if step == 1 else f"{question} in steps of {step}."
    return Problem("range", (f"range {start} {step} {length}",), prompt, "", f"{', '.join(map(str, numbers))}.")


def numbered(rng: random.Random, length: int) -> Problem:
    words = [rng.choice(WORDS) for _ in range(length)]
    items = ", ".join(words)
    prompt = rng.choice((f"Make a numbered list: {items}.", f"Number these words: {items}."))
    final = "\n".join(f"{index}. {word}" for index, word in enumerate(words, 1))
    return Problem("numbered", (f"numbered {words}",), prompt, "", final)


def make_range(rng: random.Random) -> Problem:
    return counted(rng, rng.randint(5, 12))


def make_numbered(rng: random.Random) -> Problem:
    return numbered(rng, rng.randint(3, 6))


KINDS: dict[str, tuple[Callable[[random.Random], Problem], float]] = {  # generator and share in the corpus
    "add": (make_add, 1.2),
    "subtract": (make_subtract, 1.5),
    "multiply": (make_multiply, 1.6),
    "percent": (make_percent, 1.0),
    "convert": (make_convert, 1.1),
    "sort": (make_sort, 1.5),
    "alphabet": (make_alphabet, 1.5),
    "reverse": (make_reverse, 1.0),
    "tally": (make_tally, 1.1),
    "json": (make_json, 0.8),
    "python": (make_python, 0.8),
    "calendar": (make_calendar, 1.0),
    "spell": (make_spell, 0.9),
    "explain": (make_explain, 0.7),
    "story": (make_story, 0.8),
    "words": (make_words, 0.8),
    "range": (make_range, 0.8),
    "numbered": (make_numbered, 0.6),
    "count": (make_count, 0.0),
}
SYSTEMS = ("You are a helpful assistant.", "You are TriMode, a small language model.", "Answer step by step.")


REVISED_SHARES = {"tally": 0.0, "count": 1.2, "range": 2.4, "calendar": 1.5, "alphabet": 2.2, "sort": 3.0}


class Corpus:
    """An endless, seeded stream of conversations. held_out: take only held-out problems, or only the others."""

    def __init__(
        self, seed: int, held_out: bool, shares: dict[str, float] | None = None, several: float = 0.04
    ) -> None:
        self.rng = random.Random(f"{seed} {held_out}")
        self.held_out = held_out
        self.shares = {kind: share for kind, (_, share) in KINDS.items()} | (shares or {})
        self.several_share = several

    def admit(self, make: Callable[[random.Random], Problem]) -> Problem:
        while True:
            problem = make(self.rng)
            if all(is_held_out(key) == self.held_out for key in problem.keys):
                return problem

    def problem(self, kind: str | None = None) -> Problem:
        if kind is None:
            kind = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
        return self.admit(KINDS[kind][0])

    def several(self, count: int) -> Problem:
        """Several questions in one prompt. It is held out if and only if each of its questions is."""
        parts = [self.problem() for _ in range(count)]
        prompt = "\n".join(("Answer these questions.", *(f"{i}) {part.prompt}" for i, part in enumerate(parts, 1))))
        final = "\n".join(f"{i}) {part.answer}" for i, part in enumerate(parts, 1))
        return Problem("several", tuple(key for part in parts for key in part.keys), prompt, "", final)

    def turn(self) -> Turn:
        problem = self.problem()
        return Turn(problem, thinking=bool(problem.work) and self.rng.random() < 0.08)

    def chat(self, count: int, kind: str | None = None) -> Conversation:
        """Several turns. kind: of the last turn's problem; None draws it."""
        turns = [self.turn() for _ in range(count - 1)]
        return Conversation((*turns, Turn(self.problem(kind)) if kind else self.turn()))

    def long(self) -> Conversation:
        """A row that reaches past 256 positions, in one of three ways."""
        form = self.rng.random()
        if form < 0.5:
            conversation = self.chat(self.rng.randint(4, 7))
        elif form < 0.8:
            make = self.rng.choice((numbered, counted))
            length = self.rng.randint(20, 40)
            conversation = Conversation((Turn(self.admit(lambda rng: make(rng, length))),))
        else:
            conversation = Conversation((Turn(self.several(self.rng.randint(3, 5))),))
        return Conversation(conversation.turns, long=True)

    def conversation(self) -> Conversation:
        """One row: 80 % one question, 12 % two or three turns, 4 % two questions at once, 4 % long."""
        shape = self.rng.random()
        if shape < 0.04:
            return self.long()
        if shape < 0.04 + self.several_share:
            return Conversation((Turn(self.several(2)),))
        conversation = self.chat(self.rng.randint(2, 3) if shape < 0.16 + self.several_share else 1)
        system = self.rng.choice(SYSTEMS) if self.rng.random() < 0.04 else ""
        return Conversation(conversation.turns, system)

    def __iter__(self) -> Iterator[Conversation]:
        while True:
            yield self.conversation()


def record(conversation: Conversation) -> dict[str, object]:
    """A held-out example: the chat up to its last question, and the answer to it."""
    messages = conversation.messages()
    kind = "long" if conversation.long else conversation.turns[-1].problem.kind
    return {"kind": kind, "messages": messages[:-1], "answer": messages[-1]["content"]}


def held_out_records(seed: int, per_kind: int = 16, several: int = 16, chats: int = 36, lists: int = 12) -> list[dict]:
    """The evaluation's prompts.

    Every kind is equally frequent, alone or (one in six) at the end of a chat. Then two questions in one prompt, chats
    of five or six turns, and long rows as in the training mixture.
    """
    corpus = Corpus(seed, held_out=True, shares={"tally": 0.0, "count": 1.1})
    records: dict[str, dict[str, object]] = {}

    def long_chat() -> Conversation:
        return replace(corpus.chat(corpus.rng.randint(5, 6)), long=True)

    def gather(count: int, make: Callable[[], Conversation]) -> None:
        wanted = len(records) + count
        while len(records) < wanted:
            example = record(make())
            records.setdefault(json.dumps(example["messages"]), example)

    for kind in [kind for kind, share in corpus.shares.items() if share]:
        gather(per_kind, lambda kind=kind: corpus.chat(3 if corpus.rng.random() < 1 / 6 else 1, kind))
    gather(several, lambda: Conversation((Turn(corpus.several(2)),)))
    gather(chats, long_chat)
    gather(lists, corpus.long)
    return list(records.values())


if __name__ == "__main__":
    for example in held_out_records(0, 1, 1, 1, 2):
        print(f"[{example['kind']}]", *(f"{m['role']}: {m['content']}" for m in example["messages"]), sep="\n")
        print(f"answer: {example['answer']}\n")
