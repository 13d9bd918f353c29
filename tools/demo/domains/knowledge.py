"""Common sense: short questions about the world that are answered from knowledge, with no steps in between."""

from __future__ import annotations

import random

from .facts import (
    ANIMALS,
    CAPITALS,
    CAUSES,
    CONTINENTS,
    GROUPS,
    HEAVIER,
    MATERIALS,
    MONTHS,
    OPPOSITES,
    PLACES,
    TOOLS,
    WORKERS,
)
from .made import Kinds, Made, a, listed, people, pick, up


def capital(rng: random.Random) -> Made:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.5:
        question = pick(
            rng,
            f"What is the capital of {country}?",
            f"Name the capital city of {country}.",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
            f"I forgot what the capital of {country} is called. Remind me.",
        )
        return Made(
            instruction=question, output=pick(rng, f"{city}.", f"The capital of {country} is {city}.", f"It is {city}.")
        )
    question = pick(
        rng,
        f"Which country has {city} as its capital?",
        f"{city} is the capital of which country?",
        f"Of what country is {city} the capital?",
    )
    return Made(instruction=question, output=pick(rng, f"{country}.", f"{city} is the capital of {country}."))


def continent(rng: random.Random) -> Made:
    place, countries = rng.choice(list(CONTINENTS.items()))
    country = rng.choice(countries)
    question = pick(
        rng,
        f"On which continent does {country} lie?",
        f"What continent is {country} part of?",
        f"Where in the world is {country}?",
        f"Name the continent of {country}.",
    )
    return Made(instruction=question, output=pick(rng, f"{place}.", f"{country} lies in {place}."))


def animal(rng: random.Random) -> Made:
    name, (group, legs, food, home, young) = rng.choice(list(ANIMALS.items()))
    asked = rng.randrange(5)
    if asked == 0:
        question = (
            pick(
                rng,
                f"How many legs does {a(name)} have?",
                f"Count the legs of {a(name)}.",
                f"{up(a(name))} walks on how many legs?",
            )
            if legs
            else pick(rng, f"Does {a(name)} have legs?", f"Has {a(name)} any legs?")
        )
        said = f"{up(a(name))} has {legs} legs." if legs else f"No, {a(name)} has no legs."
        return Made(instruction=question, output=said)
    if asked == 1:
        question = pick(
            rng,
            f"What does {a(name)} mostly eat?",
            f"Name the usual food of {a(name)}.",
            f"What would you find {a(name)} eating?",
        )
        return Made(
            instruction=question,
            output=pick(rng, f"{up(food)}.", f"{up(a(name))} mostly eats {food}."),
        )
    if asked == 2:
        question = pick(
            rng,
            f"Where does {a(name)} usually live?",
            f"In what kind of place is {a(name)} at home?",
            f"Where would you look for {a(name)}?",
        )
        return Made(
            instruction=question,
            output=pick(rng, f"{up(home)}.", f"{up(a(name))} usually lives {home}."),
        )
    if asked == 3:
        question = pick(
            rng,
            f"What is the young of {a(name)} called?",
            f"What do people call a baby {name}?",
            f"Give the word for a very young {name}.",
        )
        return Made(instruction=question, output=pick(rng, f"{up(a(young))}.", f"A young {name} is called {a(young)}."))
    wrong = rng.choice([g for g in ("mammal", "bird", "fish", "insect", "reptile") if g != group])
    options = rng.sample([group, wrong], 2)
    question = pick(
        rng,
        f"Is {a(name)} {a(options[0])} or {a(options[1])}?",
        f"What kind of animal is {a(name)}: {a(options[0])} or {a(options[1])}?",
    )
    return Made(instruction=question, output=pick(rng, f"{up(a(group))}.", f"{up(a(name))} is {a(group)}."))


def tool(rng: random.Random) -> Made:
    thing, use = rng.choice(list(TOOLS.items()))
    if rng.random() < 0.5:
        question = pick(
            rng,
            f"What is {a(thing)} used for?",
            f"Why would someone own {a(thing)}?",
            f"What do people do with {a(thing)}?",
        )
        return Made(
            instruction=question,
            output=pick(rng, f"To {use}.", f"{up(a(thing))} is used to {use}.", f"People use it to {use}."),
        )
    person = rng.choice(people(rng, 1))
    question = pick(
        rng,
        f"{person} wants to {use}. Which object helps?",
        f"What would you take to {use}?",
        f"Name something you need in order to {use}.",
    )
    return Made(
        instruction=question,
        output=pick(rng, f"{up(a(thing))}.", f"{up(a(thing))} is the right object for that."),
    )


def choice(rng: random.Random) -> Made:
    thing, use = rng.choice(list(TOOLS.items()))
    others = rng.sample([name for name in TOOLS if name != thing], 3)
    options = rng.sample([thing, *others], 4)
    question = pick(
        rng,
        f"Which of these would you use to {use}?",
        f"Pick the object that lets you {use}.",
        f"You need to {use}. Choose the right object.",
    )
    lines = "\n".join(f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
    answer = "ABCD"[options.index(thing)]
    return Made(instruction=question, input=lines, output=pick(rng, f"{answer}) {thing}", f"{answer}, the {thing}."))


def opposite(rng: random.Random) -> Made:
    left, right = rng.sample(rng.choice(OPPOSITES), 2)
    question = pick(
        rng,
        f"What is the opposite of {left}?",
        f"Give the opposite of the word {left}.",
        f"Which word means the reverse of {left}?",
        f"If something is not {left} but quite the contrary, what is it?",
        f"Say the opposite: {left}.",
    )
    return Made(instruction=question, output=pick(rng, f"{up(right)}.", f"The opposite of {left} is {right}."))


def worker(rng: random.Random) -> Made:
    job, does = rng.choice(list(WORKERS.items()))
    if rng.random() < 0.5:
        question = pick(
            rng,
            f"What does {a(job)} do?",
            f"Describe the work of {a(job)} in a few words.",
            f"What is the job of {a(job)}?",
        )
        return Made(instruction=question, output=f"{up(a(job))} {does}.")
    question = pick(
        rng, f"Who {does}?", f"What do we call a person who {does}?", f"Which profession fits someone who {does}?"
    )
    return Made(instruction=question, output=pick(rng, f"{up(a(job))}.", f"That is {a(job)}."))


def material(rng: random.Random) -> Made:
    thing, stuff = rng.choice(list(MATERIALS.items()))
    question = pick(
        rng,
        f"What is {a(thing)} usually made of?",
        f"Which material is {a(thing)} made from?",
        f"Name the usual material of {a(thing)}.",
    )
    return Made(
        instruction=question,
        output=pick(rng, f"{up(stuff)}.", f"{up(a(thing))} is usually made of {stuff}."),
    )


def heavier(rng: random.Random) -> Made:
    low, high = sorted(rng.sample(range(len(HEAVIER)), 2))
    light, heavy = HEAVIER[low], HEAVIER[high]
    pair = rng.sample([light, heavy], 2)
    if rng.random() < 0.5:
        question = pick(
            rng, f"Which is heavier, {a(pair[0])} or {a(pair[1])}?", f"What weighs more: {a(pair[0])} or {a(pair[1])}?"
        )
        return Made(
            instruction=question,
            output=pick(rng, f"{up(a(heavy))}.", f"{up(a(heavy))} is heavier than {a(light)}."),
        )
    question = pick(
        rng, f"Which is lighter, {a(pair[0])} or {a(pair[1])}?", f"What weighs less: {a(pair[0])} or {a(pair[1])}?"
    )
    return Made(
        instruction=question,
        output=pick(rng, f"{up(a(light))}.", f"{up(a(light))} is lighter than {a(heavy)}."),
    )


def cause(rng: random.Random) -> Made:
    event, reason = rng.choice(list(CAUSES.items()))
    person = people(rng, 1)[0]
    question = pick(
        rng,
        f"Why {event}?",
        f"Answer briefly: why {event}?",
        f"{person} asks: why {event}?",
        f"A child wants to know: why {event}? Give one short reason.",
    )
    return Made(instruction=question, output=pick(rng, f"Because {reason}.", f"{reason[0].upper()}{reason[1:]}."))


def place(rng: random.Random) -> Made:
    where, what = rng.choice(list(PLACES.items()))
    person = people(rng, 1)[0]
    if rng.random() < 0.5:
        question = pick(
            rng,
            f"Where do people go to {what}?",
            f"{person} wants to {what}. Where should {person} go?",
            f"Which place do you visit in order to {what}?",
        )
        return Made(instruction=question, output=pick(rng, f"To {a(where)}.", f"{up(a(where))} is the place for that."))
    question = pick(
        rng,
        f"What do people do at {a(where)}?",
        f"Why is {person} going to {a(where)}?",
        f"Name one reason to visit {a(where)}.",
    )
    return Made(instruction=question, output=pick(rng, f"To {what}.", f"Most people go there to {what}."))


def odd_one_out(rng: random.Random) -> Made:
    """Between knowledge and reasoning: one has to know the words and to compare them."""
    inside, outside = rng.sample(list(GROUPS), 2)
    words = rng.sample(GROUPS[inside], 3)
    odd = rng.choice(GROUPS[outside])
    shown = rng.sample([*words, odd], 4)
    question = pick(
        rng,
        "Which word does not belong with the others?",
        "Find the odd one out.",
        "Three of these go together. Which one does not?",
    )
    return Made(
        instruction=question,
        input=", ".join(shown),
        output=pick(
            rng,
            f"{up(odd)}.",
            f"{up(odd)}, because the others are {inside}.",
            f"{listed([up(w) if i == 0 else w for i, w in enumerate(words)])} are {inside}, so {odd} does not belong.",
        ),
    )


def month(rng: random.Random) -> Made:
    """Between knowledge and reasoning: the calendar is known, the step is counted."""
    start, steps = rng.randrange(12), rng.randrange(1, 8)
    forward = rng.random() < 0.6
    answer = MONTHS[(start + (steps if forward else -steps)) % 12]
    way = "after" if forward else "before"
    count = f"{steps} months" if steps > 1 else "one month"
    question = pick(
        rng,
        f"Which month comes {count} {way} {MONTHS[start]}?",
        f"Name the month that is {count} {way} {MONTHS[start]}.",
        f"It is {MONTHS[start]}. Which month {'will it be' if forward else 'was it'} {'in ' + count if forward else count + ' ago'}?",
    )
    return Made(instruction=question, output=pick(rng, f"{answer}.", f"It is {answer}."))


def number_fact(rng: random.Random) -> Made:
    """Between knowledge and mathematics: known quantities asked as sums."""
    unit, each, whole = rng.choice(
        [("days", 7, "weeks"), ("hours", 24, "days"), ("minutes", 60, "hours"), ("months", 12, "years"), ("seconds", 60, "minutes"), ("wheels", 2, "bicycles"), ("wheels", 4, "cars"), ("legs", 8, "spiders"), ("legs", 6, "ants"), ("centimetres", 100, "metres"), ("grams", 1000, "kilograms"), ("players", 11, "football teams"), ("strings", 4, "violins"), ("sides", 6, "hexagons")]
    )  # fmt: skip
    count = rng.randrange(2, 13)
    question = pick(
        rng,
        f"How many {unit} are there in {count} {whole}?",
        f"{count} {whole}: how many {unit} is that together?",
        f"Tell me the number of {unit} in {count} {whole}.",
    )
    return Made(
        instruction=question,
        output=pick(
            rng,
            f"{count * each}.",
            f"{count} {whole} have {count * each} {unit}.",
            f"There are {count * each} {unit} in {count} {whole}.",
        ),
    )


KINDS: Kinds = [
    ("capital", 1.2, capital),
    ("continent", 0.8, continent),
    ("animal", 2.0, animal),
    ("tool", 1.5, tool),
    ("choice", 1.5, choice),
    ("opposite", 1.0, opposite),
    ("worker", 1.0, worker),
    ("material", 0.8, material),
    ("heavier", 1.0, heavier),
    ("cause", 1.0, cause),
    ("place", 1.0, place),
    ("odd_one_out", 0.9, odd_one_out),
    ("month", 0.5, month),
    ("number_fact", 0.6, number_fact),
]
