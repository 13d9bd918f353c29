"""Reasoning: everything needed stands in the question; the answer follows from it, often with the steps shown."""

from __future__ import annotations

import random
from itertools import pairwise

from .made import THINGS, Kinds, Made, a, listed, people, pick, up

ORDERS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("stronger", "weaker", "strongest", "weakest"),
    ("richer", "poorer", "richest", "poorest"),
)
CLASSES = [
    "tokkins",
    "brimbles",
    "vashers",
    "lorrets",
    "quellins",
    "dapples",
    "zorrins",
    "mivets",
    "haggles",
    "perrins",
    "wuffets",
    "nimbles",
]
TRAITS = [
    "blue",
    "shy",
    "hungry",
    "noisy",
    "round",
    "sleepy",
    "brave",
    "curious",
    "spotted",
    "patient",
    "clever",
    "hairy",
]
BOXES = ["basket", "drawer", "cupboard", "suitcase", "bag", "chest", "bucket", "shelf", "tin", "jar"]
KEEPSAKES = ["key", "letter", "ring", "coin", "map", "ticket", "photo", "watch", "scarf", "spoon"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black"]


def ranking(rng: random.Random) -> Made:
    names = people(rng, rng.choice([3, 3, 4, 5]))
    more, less, most, least = rng.choice(ORDERS)
    clues = []
    for upper, lower in pairwise(names):
        clues.append(f"{upper} is {more} than {lower}." if rng.random() < 0.5 else f"{lower} is {less} than {upper}.")
    rng.shuffle(clues)
    top = rng.random() < 0.5
    answer = names[0] if top else names[-1]
    question = pick(rng, f"Who is the {most if top else least}?", f"Which of them is the {most if top else least}?")
    steps = listed(names, "and then")
    said = pick(
        rng,
        f"{answer}.",
        f"{answer} is the {most if top else least}.",
        f"From the {most} to the {least} the order is {steps}. So {answer} is the {most if top else least}.",
    )
    if rng.random() < 0.4:
        return Made(instruction=question, input=" ".join(clues), output=said)
    return Made(instruction=" ".join([*clues, question]), output=said)


def syllogism(rng: random.Random) -> Made:
    small, middle, large = rng.sample(CLASSES, 3)
    name, trait = people(rng, 1)[0], rng.choice(TRAITS)
    shape = rng.randrange(5)
    one = small[:-1]
    if shape == 0:
        given, asked = f"All {small} are {middle}. All {middle} are {large}.", f"Are all {small} {large}?"
        said = f"Yes. Every {one} is one of the {middle}, and all of those are {large}."
    elif shape == 1:
        given, asked = f"All {small} are {trait}. {name} is {a(one)}.", f"Is {name} {trait}?"
        said = f"Yes, because {name} is {a(one)} and all {small} are {trait}."
    elif shape == 2:
        given, asked = f"No {small} are {trait}. {name} is {a(one)}.", f"Is {name} {trait}?"
        said = f"No. {name} is {a(one)}, and no {small} are {trait}."
    elif shape == 3:
        given, asked = f"All {small} are {trait}. {name} is {trait}.", f"Must {name} be {a(one)}?"
        said = f"No. Others may be {trait} too, so it does not follow."
    else:
        given, asked = f"Some {small} are {middle}. All {middle} are {trait}.", f"Are some {small} {trait}?"
        said = f"Yes. The {small} that are {middle} must be {trait}."
    lead = pick(rng, "", "Suppose that this is true. ", "Take these statements as given. ", "Think it through. ")
    if rng.random() < 0.5:
        return Made(instruction=f"{lead}{asked}", input=given, output=said)
    return Made(instruction=f"{lead}{given} {asked}", output=said)


def conditional(rng: random.Random) -> Made:
    name, other = people(rng, 2)
    cause, effect = rng.choice(
        [
            ("it rains", "the match is called off"),
            ("the bell rings", "the dog barks"),
            ("the light is red", "the tram waits"),
            (f"{other} comes", f"{name} bakes a cake"),
            ("the shop is open", f"{name} buys bread"),
            ("the battery is empty", "the lamp stays dark"),
            ("the bridge is closed", "the bus takes the long way"),
            ("snow falls", "the school is closed"),
        ]
    )
    effect_not = f"it is not the case that {effect}"
    shape = rng.randrange(3)
    if shape == 0:
        fact, asked, said = up(cause), "What follows?", f"It follows that {effect}."
    elif shape == 1:
        fact, asked = up(effect_not), "What can we say about the condition?"
        said = f"It is not the case that {cause}, since otherwise {effect}."
    else:
        fact, asked = up(effect), f"Does it follow that {cause}?"
        said = f"No. The rule does not say that this is the only way in which {effect}."
    lead = pick(rng, "If", "Whenever", "Every time")
    return Made(instruction=f"{lead} {cause}, {effect}. {fact}. {asked}", output=said)


def tracking(rng: random.Random) -> Made:
    person, other = people(rng, 2)
    item = rng.choice(KEEPSAKES)
    places = rng.sample(BOXES, rng.choice([2, 3, 4]))
    story = [f"{person} puts the {item} into the {places[0]}."]
    for where in places[1:]:
        story.append(f"{rng.choice([person, other])} moves it to the {where}.")
    extra = rng.choice([name for name in KEEPSAKES if name != item])
    if rng.random() < 0.5:
        story.insert(
            rng.randrange(1, len(story) + 1),
            f"{other} leaves the {extra} in the {rng.choice(BOXES)}.",
        )
        story = [line.replace("moves it", f"moves the {item}") for line in story]
    asked = pick(
        rng,
        f"Where is the {item} now?",
        f"In the end, where is the {item}?",
        f"Where should {person} look for the {item}?",
    )
    said = pick(
        rng,
        f"In the {places[-1]}.",
        f"The {item} is in the {places[-1]}.",
        f"It was last moved to the {places[-1]}, so it is there." if len(places) > 1 else f"In the {places[-1]}.",
    )
    if rng.random() < 0.4:
        return Made(instruction=asked, input=" ".join(story), output=said)
    return Made(instruction=" ".join([*story, asked]), output=said)


def seating(rng: random.Random) -> Made:
    names = people(rng, 4)
    clues = [
        f"{names[0]} sits at the left end.",
        f"{names[1]} sits directly to the right of {names[0]}.",
        f"{names[3]} is not next to {names[1]}.",
    ]
    rng.shuffle(clues)
    seat = rng.randrange(4)
    asked = pick(
        rng,
        f"Who sits in seat {seat + 1}, counted from the left?",
        f"Counting from the left, who has seat number {seat + 1}?",
    )
    said = pick(
        rng,
        f"{names[seat]}.",
        f"From left to right they sit: {', '.join(names)}. So seat {seat + 1} belongs to {names[seat]}.",
    )
    return Made(
        instruction=f"{listed(sorted(names))} sit in a row of four seats. {' '.join(clues)} {asked}", output=said
    )


def family(rng: random.Random) -> Made:
    first, second, third = people(rng, 3)
    shape = rng.randrange(4)
    if shape == 0:
        given, said = f"{first} is a parent of {second}. {second} is a parent of {third}.", "grandparent"
    elif shape == 1:
        given, said = f"{first} and {second} have the same parents. {second} is a parent of {third}.", "aunt or uncle"
    elif shape == 2:
        given, said = f"{first} is a child of {second}. {third} is another child of {second}.", "brother or sister"
    else:
        given, said = f"{first} is a child of {second}. {third} is a parent of {second}.", "grandchild"
    asked = pick(rng, f"What is {first} to {third}?", f"How is {first} related to {third}?")
    return Made(
        instruction=f"{given} {asked}", output=pick(rng, f"{up(a(said))}.", f"{first} is {a(said)} of {third}.")
    )


def weekday(rng: random.Random) -> Made:
    """Between reasoning and mathematics: a remainder in disguise."""
    start, steps = rng.randrange(7), rng.randrange(2, 40)
    answer = DAYS[(start + steps) % 7]
    asked = pick(
        rng,
        f"Today is {DAYS[start]}. Which day will it be in {steps} days?",
        f"If today is {DAYS[start]}, what day of the week comes {steps} days later?",
        f"A letter is posted on {DAYS[start]} and arrives {steps} days later. On which weekday does it arrive?",
    )
    weeks, rest = divmod(steps, 7)
    whole = f"After {7 * weeks} days it is {DAYS[start]} again" if weeks else f"It starts on {DAYS[start]}"
    left = f"{rest} more {'day leads' if rest == 1 else 'days lead'} to {answer}" if rest else f"so it is {answer}"
    return Made(instruction=asked, output=pick(rng, f"{answer}.", f"{whole}, and {left}.".replace("and so", "so")))


def pattern(rng: random.Random) -> Made:
    """Between reasoning and mathematics: find the rule, then continue."""
    start, step = rng.randrange(1, 20), rng.randrange(2, 10)
    kind = rng.randrange(4)
    if kind == 0:
        terms, rule = [start + step * i for i in range(6)], f"each number is {step} more than the one before"
    elif kind == 1:
        start, step = rng.randrange(1, 6), rng.randrange(2, 4)
        terms, rule = [start * step**i for i in range(6)], f"each number is {step} times the one before"
    elif kind == 2:
        top = start + step * 8
        terms, rule = [top - step * i for i in range(6)], f"each number is {step} less than the one before"
    else:
        terms = [start, start + step]
        while len(terms) < 6:
            terms.append(terms[-1] + terms[-2])
        rule = "each number is the sum of the two before it"
    shown = ", ".join(map(str, terms[:5]))
    asked = pick(
        rng,
        f"Which number comes next: {shown}, ...?",
        f"Continue the pattern: {shown}.",
        f"What is the next number in {shown}?",
    )
    return Made(
        instruction=asked,
        output=pick(
            rng,
            f"{terms[5]}.",
            f"{terms[5]}, because {rule}.",
            f"The rule is that {rule}, so the next number is {terms[5]}.",
        ),
    )


def letters(rng: random.Random) -> Made:
    start, step = rng.randrange(0, 10), rng.randrange(1, 4)
    terms = [chr(ord("A") + start + step * i) for i in range(5)]
    asked = pick(
        rng,
        f"Which letter follows: {', '.join(terms[:4])}?",
        f"Find the next letter of the pattern {' '.join(terms[:4])}.",
    )
    skip = "the letters follow the alphabet" if step == 1 else f"every step moves {step} letters on"
    return Made(instruction=asked, output=pick(rng, f"{terms[4]}.", f"{terms[4]}, because {skip}."))


def sharing(rng: random.Random) -> Made:
    """Between reasoning and mathematics: a story with small sums and one distraction."""
    first, second, third = people(rng, 3)
    thing = rng.choice(THINGS)
    have, give, more = rng.randrange(8, 40), rng.randrange(2, 8), rng.randrange(2, 9)
    story = (
        f"{first} has {have} {thing} and gives {give} of them to {second}. Later {third} gives {first} {more} {thing}. "
        f"{second} already had some {rng.choice([t for t in THINGS if t != thing])}."
    )
    total = have - give + more
    asked = pick(
        rng, f"How many {thing} does {first} have in the end?", f"What is the number of {thing} that {first} has now?"
    )
    said = pick(
        rng, f"{total}.", f"After giving away {give}, {first} has {have - give}. With {more} more it is {total}."
    )
    return Made(instruction=f"{story} {asked}", output=said)


def everyday(rng: random.Random) -> Made:
    """Between reasoning and knowledge: plain life decides what follows."""
    name = people(rng, 1)[0]
    story, asked, said = rng.choice(
        [
            (f"{name} left the ice cream on the sunny table for two hours.", "What state is it in now?", "It has melted, because the sun warmed it."),
            (f"{name} comes home with a wet coat and a dripping umbrella.", "What was the weather like?", "It was raining."),
            (f"{name} turns the key, but the car stays silent and its lamps stay dark.", "What is the likely reason?", "The battery is empty."),
            (f"The streets are white and children are building a snowman near {name}'s house.", "Which season is it most likely?", "It is winter."),
            (f"{name} can only see candles, because the lamps in the whole street went out.", "What has happened?", "There is a power cut."),
            (f"{name} put bread into the toaster and forgot it. Now there is smoke in the kitchen.", "What happened to the bread?", "It burnt."),
            (f"{name} poured water into the freezer tray last night.", "What does the tray hold this morning?", "It holds ice."),
            (f"{name} did not water the plant for a month. Its leaves are brown.", "What does the plant need?", "It needs water."),
            (f"The shop closes at six. {name} arrives at seven.", "Can the shopping be done today?", "No, the shop is already closed."),
            (f"{name} hears the bell of a tower strike twelve while the stars are out.", "What time is it?", "It is midnight."),
            (f"{name} is allergic to nuts. The cake on the table holds walnuts.", "Should this cake be eaten?", f"No, because walnuts are nuts and {name} is allergic to them."),
            (f"{name} missed the last bus and the trains are not running.", "How can the way home be made?", "On foot or by taxi."),
        ]
    )  # fmt: skip
    lead = pick(rng, "", "Read and answer. ", "Think about this. ", "Draw a conclusion. ")
    if rng.random() < 0.3:
        return Made(instruction=f"{lead}{asked}", input=story, output=said)
    return Made(instruction=f"{lead}{story} {asked}", output=said)


def elimination(rng: random.Random) -> Made:
    names, colours = people(rng, 3), rng.sample(COLOURS, 3)
    item = pick(rng, "hat", "scarf", "bicycle", "kite", "cup")
    clues = [f"{names[0]} has the {colours[0]} {item}.", f"{names[1]} does not have the {colours[2]} {item}."]
    rng.shuffle(clues)
    who = rng.choice([1, 2])
    asked = pick(rng, f"Which {item} does {names[who]} have?", f"What colour is the {item} of {names[who]}?")
    said = pick(
        rng,
        f"The {colours[who]} one.",
        f"{names[1]} cannot have the {colours[2]} one and the {colours[0]} one is taken, so {names[1]} has the {colours[1]} {item} and {names[2]} the {colours[2]} one.",
    )
    start = f"{listed(names)} own one {item} each: {listed([f'a {c} one' for c in colours])}."
    return Made(instruction=f"{start} {' '.join(clues)} {asked}", output=said)


KINDS: Kinds = [
    ("ranking", 1.6, ranking),
    ("syllogism", 1.5, syllogism),
    ("conditional", 1.0, conditional),
    ("tracking", 1.5, tracking),
    ("seating", 1.0, seating),
    ("family", 1.0, family),
    ("weekday", 0.6, weekday),
    ("pattern", 0.6, pattern),
    ("letters", 0.3, letters),
    ("sharing", 0.7, sharing),
    ("everyday", 0.8, everyday),
    ("elimination", 1.2, elimination),
]
