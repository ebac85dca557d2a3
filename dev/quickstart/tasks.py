"""Short general instructions with one right answer each, generated from word lists and a seed.

The tiny base model of the quick start is pre-trained on these tasks, so that it has general abilities that a
fine-tune on something else can damage. Every task is a function from a random generator to a prompt and its answer.
Prompts fall into three splits by a hash of their text, so the splits are disjoint whatever seeds and counts are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

Row = dict[str, str]
Task = Callable[[Random], tuple[str, str]]

SPLITS = ("pretrain", "pool", "test")


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words at its spaces."""
    return tuple(text.split())


CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": _words("cat dog horse cow sheep goat rabbit mouse lion tiger bear wolf fox deer monkey camel zebra"),
    "bird": _words("eagle owl crow duck goose swan hawk robin parrot pigeon sparrow raven"),
    "fruit": _words("apple banana cherry grape lemon mango melon fig peach pear plum kiwi"),
    "vegetable": _words("carrot potato onion cabbage spinach pepper turnip radish celery lettuce"),
    "color": _words("red blue green yellow purple brown black white pink gray"),
    "tool": _words("hammer saw drill wrench shovel rake ladder chisel pliers axe"),
    "vehicle": _words("car bus truck train bicycle boat airplane tractor wagon scooter"),
    "garment": _words("shirt coat hat sock glove scarf dress jacket skirt belt"),
    "instrument": _words("piano guitar violin drum flute trumpet harp cello banjo tuba"),
    "job": _words("doctor nurse teacher farmer baker pilot sailor painter plumber lawyer judge waiter"),
    "room": _words("kitchen bedroom bathroom attic cellar hall office library garage pantry"),
    "metal": _words("iron steel zinc tin lead nickel chrome titanium"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
WORDS = tuple(CATEGORY_OF)

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "happy": "sad", "light": "dark", "high": "low",
    "long": "short", "hard": "soft", "wet": "dry", "full": "empty", "early": "late", "loud": "quiet", "rich": "poor",
    "strong": "weak", "open": "closed", "clean": "dirty", "thick": "thin", "wide": "narrow", "deep": "shallow",
    "brave": "afraid", "cheap": "expensive", "sweet": "bitter", "true": "false", "near": "far", "up": "down",
    "left": "right", "push": "pull", "buy": "sell", "win": "lose", "begin": "end", "always": "never",
}  # fmt: skip
PLURALS = {
    "child": "children", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women", "mouse": "mice",
    "goose": "geese", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "life": "lives", "shelf": "shelves",
    "box": "boxes", "bus": "buses", "dish": "dishes", "watch": "watches", "fox": "foxes", "baby": "babies",
    "city": "cities", "story": "stories", "berry": "berries", "cherry": "cherries", "hero": "heroes",
    "potato": "potatoes", "tomato": "tomatoes", "table": "tables", "chair": "chairs", "book": "books", "cat": "cats",
    "dog": "dogs", "tree": "trees", "car": "cars", "river": "rivers", "window": "windows", "garden": "gardens",
}  # fmt: skip
PAST_TENSES = {
    "go": "went", "see": "saw", "eat": "ate", "run": "ran", "take": "took", "give": "gave", "write": "wrote",
    "speak": "spoke", "drink": "drank", "swim": "swam", "sing": "sang", "buy": "bought", "bring": "brought",
    "think": "thought", "teach": "taught", "catch": "caught", "find": "found", "make": "made", "sleep": "slept",
    "keep": "kept", "break": "broke", "choose": "chose", "drive": "drove", "fly": "flew", "grow": "grew",
    "walk": "walked", "play": "played", "jump": "jumped", "open": "opened", "help": "helped", "carry": "carried",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "Hungary": "Budapest", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima",
    "Kenya": "Nairobi", "Turkey": "Ankara", "Iraq": "Baghdad", "Iran": "Tehran", "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
}  # fmt: skip
UNITS: tuple[tuple[str, str, int], ...] = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("meters", "centimeters", 100),
    ("kilometers", "meters", 1000), ("kilograms", "grams", 1000), ("pounds", "ounces", 16), ("gallons", "quarts", 4),
)  # fmt: skip
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NAMES = _words("Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Mary Nick Olga Paul Rose Sam")
PLACES = _words("park school market station museum garden forest harbor church hotel cafe barn")
OBJECTS = _words("book letter key map bag lamp clock phone cup ring photo basket umbrella ticket")
ACTIONS = _words("found lost bought sold dropped painted forgot saw broke hid")
GOOD = _words("great lovely excellent wonderful delicious charming superb brilliant perfect delightful")
BAD = _words("awful terrible horrible boring dreadful disgusting poor annoying useless miserable")
REVIEWED = _words("movie meal book hotel concert service song trip game lecture")
SMALL_NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def _say(rng: Random, *templates: str, **fields: object) -> str:
    """Fill one template, chosen at random."""
    return rng.choice(templates).format(**fields)


def _list(words: list[str]) -> str:
    """Join words by commas."""
    return ", ".join(words)


def _with_article(word: str) -> str:
    """Put the indefinite article in front of a word."""
    return ("an " if word[0] in "aeio" else "a ") + word


def sort_words(rng: Random) -> tuple[str, str]:
    """Sort three or four words alphabetically."""
    words = rng.sample(WORDS, rng.randint(3, 4))
    prompt = _say(
        rng,
        "Sort these words alphabetically: {words}",
        "Put the words in alphabetical order: {words}.",
        "Alphabetize this list: {words}",
        words=_list(words),
    )
    return prompt, _list(sorted(words))


def sort_numbers(rng: Random) -> tuple[str, str]:
    """Sort numbers upwards or downwards."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    order, down = rng.choice(
        (("from smallest to largest", False), ("in ascending order", False),
         ("from largest to smallest", True), ("in descending order", True))
    )  # fmt: skip
    prompt = _say(
        rng,
        "Sort these numbers {order}: {numbers}",
        "Arrange {numbers} {order}.",
        "Write the numbers {numbers} {order}.",
        order=order,
        numbers=_list([str(n) for n in numbers]),
    )
    return prompt, _list([str(n) for n in sorted(numbers, reverse=down)])


def count_items(rng: Random) -> tuple[str, str]:
    """Count the words of a list."""
    words = rng.sample(WORDS, rng.randint(2, 8))
    prompt = _say(
        rng,
        "How many words are in this list: {words}?",
        "Count the items: {words}",
        "Give the number of words here: {words}.",
        words=_list(words),
    )
    return prompt, str(len(words))


def count_letter(rng: Random) -> tuple[str, str]:
    """Count how often a letter occurs in a word that has it."""
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    prompt = _say(
        rng,
        'How many times does the letter "{letter}" appear in "{word}"?',
        'Count the letter "{letter}" in the word "{word}".',
        'How often does "{word}" contain "{letter}"?',
        letter=letter,
        word=word,
    )
    return prompt, str(word.count(letter))


def word_length(rng: Random) -> tuple[str, str]:
    """Count the letters of a word."""
    word = rng.choice(WORDS)
    prompt = _say(
        rng,
        'How many letters are in the word "{word}"?',
        'What is the length of "{word}" in letters?',
        'Count the letters of "{word}".',
        "How long is the word {word}?",
        word=word,
    )
    return prompt, str(len(word))


def spell(rng: Random) -> tuple[str, str]:
    """Spell a word letter by letter."""
    word = rng.choice(WORDS)
    prompt = _say(
        rng,
        'Spell the word "{word}" letter by letter.',
        "How do you spell {word}?",
        'Write "{word}" with a dash between the letters.',
        "Please spell: {word}",
        word=word,
    )
    return prompt, "-".join(word)


def reverse_word(rng: Random) -> tuple[str, str]:
    """Spell a word backwards."""
    word = rng.choice(WORDS)
    prompt = _say(
        rng,
        'Spell "{word}" backwards.',
        "Write the letters of {word} in reverse order.",
        'Reverse the word "{word}".',
        "What is {word} spelled backwards?",
        word=word,
    )
    return prompt, "-".join(reversed(word))


def edge_letter(rng: Random) -> tuple[str, str]:
    """Name the first or the last letter of a word."""
    word = rng.choice(WORDS)
    edge, index = rng.choice((("first", 0), ("last", -1)))
    prompt = _say(
        rng,
        'What is the {edge} letter of "{word}"?',
        "Give the {edge} letter of the word {word}.",
        'Which letter comes {edge} in "{word}"?',
        edge=edge,
        word=word,
    )
    return prompt, word[index]


def has_letter(rng: Random) -> tuple[str, str]:
    """Say whether a word contains a letter."""
    word = rng.choice(WORDS)
    letter = rng.choice(word) if rng.random() < 0.5 else rng.choice("abcdefghiklmnoprstuwy")
    prompt = _say(
        rng,
        'Does the word "{word}" contain the letter "{letter}"?',
        'Is there a "{letter}" in "{word}"? Answer yes or no.',
        'Yes or no: "{word}" has the letter "{letter}".',
        word=word,
        letter=letter,
    )
    return prompt, "yes" if letter in word else "no"


def initials(rng: Random) -> tuple[str, str]:
    """Build the acronym of a few words."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    prompt = _say(
        rng,
        "Write the first letters of these words: {words}",
        "Make an acronym from: {words}",
        "What are the initials of {words}?",
        words=" ".join(words),
    )
    return prompt, "".join(word[0] for word in words).upper()


def convert_units(rng: Random) -> tuple[str, str]:
    """Convert a small amount into a smaller unit."""
    big, small, factor = rng.choice(UNITS)
    amount = rng.randint(2, 12)
    prompt = _say(
        rng,
        "Convert {amount} {big} to {small}.",
        "How many {small} are in {amount} {big}?",
        "Express {amount} {big} in {small}.",
        "{amount} {big} is how many {small}?",
        amount=amount,
        big=big,
        small=small,
    )
    return prompt, f"{amount * factor} {small}"


def plural(rng: Random) -> tuple[str, str]:
    """Give the plural of a noun."""
    word = rng.choice(tuple(PLURALS))
    number = rng.randint(2, 20)
    prompt = _say(
        rng,
        'What is the plural of "{word}"?',
        "Give the plural form of {word}.",
        "One {word}, {number} what?",
        'Write "{word}" in the plural.',
        "Make this noun plural: {word}",
        word=word,
        number=number,
    )
    return prompt, PLURALS[word]


def opposite(rng: Random) -> tuple[str, str]:
    """Give the opposite of a word, in either direction."""
    word, other = rng.choice(tuple(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    prompt = _say(
        rng,
        'What is the opposite of "{word}"?',
        "Give an antonym of {word}.",
        "Name the opposite of {word}.",
        'Which word means the opposite of "{word}"?',
        "Opposite of {word}:",
        word=word,
    )
    return prompt, other


def past_tense(rng: Random) -> tuple[str, str]:
    """Put a verb, alone or in a short sentence, into the past tense."""
    verb = rng.choice(tuple(PAST_TENSES))
    if rng.random() < 0.5:
        subject = rng.choice(("I", "We", "They", "You"))
        prompt = _say(rng, "Put into the past tense: {s} {v}.", "Rewrite in the past: {s} {v}.", s=subject, v=verb)
        return prompt, f"{subject} {PAST_TENSES[verb]}."
    prompt = _say(
        rng,
        'What is the past tense of "{verb}"?',
        "Give the past form of the verb {verb}.",
        "Today I {verb}. Which verb form fits yesterday?",
        verb=verb,
    )
    return prompt, PAST_TENSES[verb]


def capital(rng: Random) -> tuple[str, str]:
    """Name a capital, or the country of a capital."""
    country, city = rng.choice(tuple(CAPITALS.items()))
    if rng.random() < 0.5:
        prompt = _say(
            rng,
            "What is the capital of {country}?",
            "Name the capital city of {country}.",
            "Which city is the capital of {country}?",
            country=country,
        )
        return prompt, city
    prompt = _say(
        rng,
        "{city} is the capital of which country?",
        "Which country has {city} as its capital?",
        "In which country is {city}?",
        city=city,
    )
    return prompt, country


def category(rng: Random) -> tuple[str, str]:
    """Name the category of a thing among three choices."""
    word = rng.choice(WORDS)
    choices = [CATEGORY_OF[word], *rng.sample([name for name in CATEGORIES if name != CATEGORY_OF[word]], 2)]
    rng.shuffle(choices)
    prompt = _say(
        rng,
        "Is {word} a kind of {a}, {b} or {c}?",
        "Choose the category of {word}: {a}, {b}, {c}",
        "Which group does {word} belong to: {a}, {b} or {c}?",
        word=word,
        a=choices[0],
        b=choices[1],
        c=choices[2],
    )
    return prompt, CATEGORY_OF[word]


def category_yes_no(rng: Random) -> tuple[str, str]:
    """Say whether a thing belongs to a category; birds count as animals, so that pair is never asked."""
    word = rng.choice(WORDS)
    actual = CATEGORY_OF[word]
    others = [name for name in CATEGORIES if {name, actual} != {"bird", "animal"} and name != actual]
    asked = actual if rng.random() < 0.5 else rng.choice(others)
    prompt = _say(
        rng,
        "Is {word} the name of {asked}?",
        "Yes or no: {word} is {asked}.",
        'True to say that "{word}" is {asked}? Answer yes or no.',
        word=word,
        asked=_with_article(asked),
    )
    return prompt, "yes" if asked == actual else "no"


def odd_one_out(rng: Random) -> tuple[str, str]:
    """Find the word that does not belong to the category of the others."""
    main, other = rng.sample(tuple(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [odd, *rng.sample(CATEGORIES[main], 3)]
    rng.shuffle(words)
    prompt = _say(
        rng,
        "Which word does not belong: {words}?",
        "Find the odd one out: {words}",
        "One of these does not fit. Which one? {words}",
        words=_list(words),
    )
    return prompt, odd


def compare_numbers(rng: Random) -> tuple[str, str]:
    """Pick the larger or the smaller of two numbers."""
    a, b = rng.sample(range(1, 1000 if rng.random() < 0.5 else 100), 2)
    which, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    prompt = _say(
        rng,
        "Which number is {which}, {a} or {b}?",
        "Pick the {which} number: {a}, {b}",
        "Of {a} and {b}, which is {which}?",
        which=which,
        a=a,
        b=b,
    )
    return prompt, str(answer)


def longest_word(rng: Random) -> tuple[str, str]:
    """Pick the longest or the shortest of three words, never a tie."""
    which, sign = rng.choice((("longest", -1), ("shortest", 1)))
    while True:
        words = rng.sample(WORDS, 3)
        ranked = sorted(words, key=lambda word: sign * len(word))
        if len(ranked[0]) != len(ranked[1]):
            break
    prompt = _say(
        rng,
        "Which word is the {which}: {words}?",
        "Pick the {which} word from {words}.",
        "Find the {which} of these words: {words}",
        which=which,
        words=_list(words),
    )
    return prompt, ranked[0]


def nth_item(rng: Random) -> tuple[str, str]:
    """Return the item at a named position of a list."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    index, position = rng.choice(((0, "first"), (1, "second"), (2, "third"), (-1, "last")))
    prompt = _say(
        rng,
        "What is the {position} word of this list: {words}?",
        "Give the {position} item: {words}",
        "From {words}, name the {position}.",
        position=position,
        words=_list(words),
    )
    return prompt, words[index]


def calendar(rng: Random) -> tuple[str, str]:
    """Name the day or month before or after another."""
    kind, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    where, step = rng.choice((("after", 1), ("before", -1)))
    index = rng.randrange(len(names))
    prompt = _say(
        rng,
        "Which {kind} comes {where} {name}?",
        "What {kind} is right {where} {name}?",
        "Name the {kind} {where} {name}.",
        "Tell me the {kind} that comes {where} {name}.",
        kind=kind,
        where=where,
        name=names[index],
    )
    return prompt, names[(index + step) % len(names)]


def number_words(rng: Random) -> tuple[str, str]:
    """Write a number below one hundred in words, or read it."""
    number = rng.randrange(100)
    tens, ones = divmod(number, 10)
    words = SMALL_NUMBERS[number] if number < 20 else TENS[tens - 2] + (f"-{SMALL_NUMBERS[ones]}" if ones else "")
    if rng.random() < 0.5:
        prompt = _say(rng, "Write {n} in words.", "Spell out the number {n}.", "How do you say {n} in words?", n=number)
        return prompt, words
    prompt = _say(
        rng, "Write {words} in digits.", 'Which number is "{words}"?', "Turn {words} into digits.", words=words
    )
    return prompt, str(number)


def extract(rng: Random) -> tuple[str, str]:
    """Answer who, what, where or when from one sentence."""
    name, action, thing = rng.choice(NAMES), rng.choice(ACTIONS), rng.choice(OBJECTS)
    place, day = rng.choice(PLACES), rng.choice(DAYS)
    sentence = _say(
        rng,
        "{name} {action} the {thing} at the {place} on {day}.",
        "On {day}, {name} {action} the {thing} at the {place}.",
        "At the {place}, {name} {action} the {thing} on {day}.",
        name=name,
        action=action,
        thing=thing,
        place=place,
        day=day,
    )
    question, answer = rng.choice(
        (
            (f"Who {action} the {thing}?", name),
            (f"What is the thing that {name} {action}?", f"the {thing}"),
            (f"Where was {name}?", f"at the {place}"),
            ("When did it happen?", f"on {day}"),
        )
    )
    return _say(rng, "{s} {q}", "{s}\nQuestion: {q}", "Read: {s} {q}", s=sentence, q=question), answer


def sentiment(rng: Random) -> tuple[str, str]:
    """Judge a one-sentence review."""
    positive = rng.random() < 0.5
    review = _say(
        rng,
        "The {noun} was {adjective}.",
        "I thought the {noun} was really {adjective}.",
        "What {adjective} service, what a {noun}!",
        "My friends and I found the {noun} quite {adjective}.",
        noun=rng.choice(REVIEWED),
        adjective=rng.choice(GOOD if positive else BAD),
    )
    prompt = _say(
        rng,
        "Is this review positive or negative? {review}",
        "Review: {review} Sentiment:",
        "{review} Did the writer like it? Say positive or negative.",
        review=review,
    )
    return prompt, "positive" if positive else "negative"


def replace_word(rng: Random) -> tuple[str, str]:
    """Replace one word of a sentence by another."""
    old, new = rng.sample(OBJECTS, 2)
    sentence = _say(
        rng,
        "{name} left the {old} in the {place}.",
        "The {old} in the {place} is for {name}.",
        "{name} gave me the {old}.",
        name=rng.choice(NAMES),
        place=rng.choice(PLACES),
        old=old,
    )
    prompt = _say(
        rng,
        'Replace "{old}" with "{new}": {sentence}',
        "Rewrite with {new} instead of {old}: {sentence}",
        old=old,
        new=new,
        sentence=sentence,
    )
    return prompt, sentence.replace(old, new)


def repeat_word(rng: Random) -> tuple[str, str]:
    """Repeat a word a given number of times."""
    word = rng.choice(WORDS)
    times = rng.randint(2, 5)
    prompt = _say(
        rng,
        'Repeat the word "{word}" {times} times.',
        "Write {word} {times} times.",
        'Say "{word}" {spelled} times.',
        word=word,
        times=times,
        spelled=SMALL_NUMBERS[times],
    )
    return prompt, " ".join([word] * times)


TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (
        sort_words,
        sort_numbers,
        count_items,
        count_letter,
        word_length,
        spell,
        reverse_word,
        edge_letter,
        has_letter,
        initials,
        convert_units,
        plural,
        opposite,
        past_tense,
        capital,
        category,
        category_yes_no,
        odd_one_out,
        compare_numbers,
        longest_word,
        nth_item,
        calendar,
        number_words,
        extract,
        sentiment,
        replace_word,
        repeat_word,
    )
}


def split_of(prompt: str) -> str:
    """Return the split a prompt belongs to: about 80% `pretrain`, 10% `pool`, 10% `test`."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return {0: "test", 1: "pool"}.get(bucket, "pretrain")


def stream(split: str, seed: int) -> Iterator[Row]:
    """Yield rows of one split for ever, tasks drawn uniformly.

    Args:
        split: One of `SPLITS`.
        seed: Seed of the random generator.

    Yields:
        Rows with `source`, `task`, `prompt` and `response`; prompts may repeat.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    rng = Random(seed)
    names = tuple(TASKS)
    while True:
        name = rng.choice(names)
        prompt, response = TASKS[name](rng)
        while split_of(prompt) != split:  # the same task again: every task keeps its share
            prompt, response = TASKS[name](rng)
        yield {"source": "general", "task": name, "prompt": prompt, "response": response}


def generate(split: str, count: int, seed: int) -> list[Row]:
    """Return `count` rows of one split, no prompt twice."""

    def unseen() -> Iterator[Row]:
        seen: set[str] = set()
        for row in stream(split, seed):
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                yield row

    return list(islice(unseen(), count))
