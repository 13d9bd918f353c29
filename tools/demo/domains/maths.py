"""Mathematics: calculation, from plain sums to equations and word problems; every answer is computed."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from .made import THINGS, Kinds, Made, people, pick

CONCEPTS = {
    "prime number": "a whole number above 1 that only 1 and itself divide",
    "even number": "a whole number that 2 divides",
    "right angle": "an angle of 90 degrees",
    "square": "a figure with four equal sides and four right angles",
    "radius": "the distance from the centre of a circle to its edge",
    "diameter": "the distance across a circle through its centre",
    "average": "the sum of the values divided by their number",
    "median": "the middle value when the values are sorted",
    "perimeter": "the length of the way around a figure",
    "fraction": "a part of a whole, written as one number over another",
    "factor": "a number that divides another number without a remainder",
    "multiple": "a number times a whole number",
    "product": "the result of a multiplication",
    "quotient": "the result of a division",
    "difference": "the result of a subtraction",
    "sum": "the result of an addition",
    "triangle": "a figure with three sides",
    "power": "a number multiplied by itself several times",
}


def arithmetic(rng: random.Random) -> Made:
    left, right = rng.randrange(2, 400), rng.randrange(2, 100)
    sign, word = rng.choice([("+", "plus"), ("-", "minus"), ("*", "times")])
    if sign == "*":
        left, right = rng.randrange(2, 30), rng.randrange(2, 13)
    if sign == "-" and right > left:
        left, right = right, left
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    question = pick(
        rng,
        f"What is {left} {sign} {right}?",
        f"Calculate {left} {sign} {right}.",
        f"Compute {left} {word} {right}.",
        f"Work out {left} {sign} {right}.",
        f"{left} {sign} {right} = ?",
    )
    return Made(
        instruction=question,
        output=pick(rng, f"{value}", f"{left} {sign} {right} = {value}", f"The result is {value}."),
    )


def chain(rng: random.Random) -> Made:
    x, y, z = rng.randrange(2, 20), rng.randrange(2, 12), rng.randrange(2, 30)
    if rng.random() < 0.5:
        text, inner, value = f"({x} + {z}) * {y}", f"{x} + {z} = {x + z}", (x + z) * y
        steps = f"First {inner}. Then {x + z} * {y} = {value}."
    else:
        text, value = f"{z} + {x} * {y}", z + x * y
        steps = f"Multiplication goes first: {x} * {y} = {x * y}. Then {z} + {x * y} = {value}."
    question = pick(rng, f"Evaluate {text}.", f"What is the value of {text}?", f"Calculate {text} and show the steps.")
    return Made(instruction=question, output=steps if "steps" in question else pick(rng, f"{value}", steps))


def division(rng: random.Random) -> Made:
    divisor, quotient = rng.randrange(3, 15), rng.randrange(3, 40)
    rest = rng.randrange(0, divisor) if rng.random() < 0.5 else 0
    whole = divisor * quotient + rest
    question = pick(
        rng,
        f"Divide {whole} by {divisor}.",
        f"What is {whole} / {divisor}, with the remainder if there is one?",
        f"How often does {divisor} go into {whole}, and what is left?",
    )
    said = f"{whole} / {divisor} = {quotient}" + (f" with remainder {rest}" if rest else "")
    return Made(instruction=question, output=f"{said}.")


def percent(rng: random.Random) -> Made:
    share, whole = rng.choice([5, 10, 20, 25, 40, 50, 60, 75, 80]), rng.randrange(2, 50) * 20
    value = whole * share // 100
    question = pick(
        rng, f"What is {share}% of {whole}?", f"Find {share} percent of {whole}.", f"Calculate {share}% of {whole}."
    )
    return Made(
        instruction=question, output=pick(rng, f"{value}", f"{share}% of {whole} is {whole} * {share} / 100 = {value}.")
    )


def fraction(rng: random.Random) -> Made:
    first = Fraction(rng.randrange(1, 8), rng.randrange(2, 10))
    second = Fraction(rng.randrange(1, 8), rng.randrange(2, 10))
    sign, value = rng.choice([("+", first + second), ("*", first * second)])
    question = pick(
        rng, f"Calculate {first} {sign} {second} as a fraction in lowest terms.", f"Simplify {first} {sign} {second}."
    )
    return Made(instruction=question, output=pick(rng, f"{value}", f"{first} {sign} {second} = {value}"))


def equation(rng: random.Random) -> Made:
    factor, root, shift = rng.randrange(2, 13), rng.randrange(-12, 21), rng.randrange(1, 40)
    name = pick(rng, "x", "y", "n")
    sign = pick(rng, "+", "-")
    right = factor * root + (shift if sign == "+" else -shift)
    back = right - shift if sign == "+" else right + shift
    question = pick(
        rng,
        f"Solve {factor}{name} {sign} {shift} = {right}.",
        f"Find {name}: {factor}{name} {sign} {shift} = {right}",
        f"For which {name} is {factor}{name} {sign} {shift} equal to {right}?",
    )
    steps = f"{factor}{name} = {back}, so {name} = {back} / {factor} = {root}."
    return Made(instruction=question, output=pick(rng, f"{name} = {root}", steps))


def divisors(rng: random.Random) -> Made:
    base = rng.randrange(2, 13)
    left, right = base * rng.randrange(2, 12), base * rng.randrange(2, 12)
    if rng.random() < 0.5:
        what, value = "greatest common divisor", math.gcd(left, right)
    else:
        what, value = "least common multiple", math.lcm(left, right)
    question = pick(rng, f"What is the {what} of {left} and {right}?", f"Find the {what} of {left} and {right}.")
    return Made(instruction=question, output=pick(rng, f"{value}", f"The {what} of {left} and {right} is {value}."))


def prime(rng: random.Random) -> Made:
    number = rng.randrange(4, 600)
    factor = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), None)
    question = pick(rng, f"Is {number} a prime number?", f"Decide whether {number} is prime.")
    said = f"Yes, {number} is prime." if factor is None else f"No, {number} = {factor} * {number // factor}."
    return Made(instruction=question, output=said)


def area(rng: random.Random) -> Made:
    wide, high = rng.randrange(2, 40), rng.randrange(2, 30)
    unit = pick(rng, "cm", "m")
    if rng.random() < 0.5:
        question = pick(
            rng,
            f"A rectangle is {wide} {unit} long and {high} {unit} wide. What is its area?",
            f"Find the area of a rectangle with sides {wide} {unit} and {high} {unit}.",
        )
        return Made(instruction=question, output=f"{wide} * {high} = {wide * high} square {unit}.")
    question = pick(
        rng,
        f"What is the perimeter of a rectangle with sides {wide} {unit} and {high} {unit}?",
        f"A garden measures {wide} {unit} by {high} {unit}. How long is the fence around it?",
    )
    return Made(instruction=question, output=f"2 * ({wide} + {high}) = {2 * (wide + high)} {unit}.")


def average(rng: random.Random) -> Made:
    count = rng.choice([3, 4, 5])
    values = [rng.randrange(1, 60) for _ in range(count - 1)]
    values.append(-sum(values) % count + count * rng.randrange(0, 8))
    total = sum(values)
    question = pick(
        rng,
        "Find the average of these numbers.",
        "What is the mean of the numbers below?",
        "Calculate the arithmetic mean.",
    )
    steps = f"The sum is {total} and there are {count} numbers, so the average is {total // count}."
    return Made(instruction=question, input=", ".join(map(str, values)), output=pick(rng, f"{total // count}", steps))


def power(rng: random.Random) -> Made:
    base, exponent = rng.choice([(rng.randrange(2, 31), 2), (rng.randrange(2, 11), 3), (2, rng.randrange(3, 13))])
    if exponent == 2 and rng.random() < 0.4:
        question = pick(rng, f"What is the square root of {base**2}?", f"Find the square root of {base**2}.")
        return Made(instruction=question, output=pick(rng, f"{base}", f"{base}, because {base} * {base} = {base**2}."))
    question = pick(rng, f"What is {base} to the power of {exponent}?", f"Calculate {base}^{exponent}.")
    return Made(instruction=question, output=pick(rng, f"{base**exponent}", f"{base}^{exponent} = {base**exponent}"))


def shopping(rng: random.Random) -> Made:
    """Between mathematics and reasoning: a story, two or three sums."""
    name, thing = people(rng, 1)[0], rng.choice(THINGS)
    count, price = rng.randrange(2, 13), rng.randrange(2, 15)
    paid = count * price + rng.randrange(1, 30)
    total = count * price
    question = pick(
        rng,
        f"{name} buys {count} {thing} for {price} euros each and pays with {paid} euros. How much change does {name} get?",
        f"{name} has {paid} euros and buys {count} {thing} at {price} euros apiece. How much money is left?",
    )
    steps = f"The {thing} cost {count} * {price} = {total} euros. {paid} - {total} = {paid - total} euros."
    return Made(instruction=question, output=pick(rng, steps, f"{paid - total} euros."))


def travel(rng: random.Random) -> Made:
    """Between mathematics and reasoning: speed, time and way."""
    speed, hours = rng.randrange(3, 25) * 5, rng.randrange(2, 9)
    who = pick(rng, "A train", "A car", "A bus", "A cyclist" if speed <= 30 else "A lorry")
    if rng.random() < 0.5:
        question = f"{who} travels at {speed} km per hour for {hours} hours. {pick(rng, 'How far does it get?', 'What distance is covered?')}"
        return Made(instruction=question, output=f"{speed} * {hours} = {speed * hours} km.")
    question = f"{who} covers {speed * hours} km in {hours} hours. {pick(rng, 'What is the average speed?', 'How fast is that on average?')}"
    return Made(instruction=question, output=f"{speed * hours} / {hours} = {speed} km per hour.")


def ages(rng: random.Random) -> Made:
    """Between mathematics and reasoning: ages that hang together."""
    first, second = people(rng, 2)
    young, gap = rng.randrange(3, 20), rng.randrange(2, 25)
    total = 2 * young + gap
    question = f"{first} is {gap} years older than {second}. Together they are {total} years old. {pick(rng, f'How old is {second}?', f'What is the age of {second}?')}"
    return Made(
        instruction=question,
        output=pick(
            rng,
            f"{young}.",
            f"Without the {gap} extra years they would be {total - gap} together, so {second} is {(total - gap) // 2}.",
        ),
    )


def concept(rng: random.Random) -> Made:
    """Between mathematics and knowledge: what a word of mathematics means."""
    word, meaning = rng.choice(list(CONCEPTS.items()))
    name = people(rng, 1)[0]
    question = pick(
        rng,
        f"What is {'an' if word[0] in 'aeiou' else 'a'} {word}?",
        f"Explain the term {word}.",
        f"What does the word {word} mean in mathematics?",
        f"{name} does not know the word {word}. Explain it.",
    )
    return Made(
        instruction=question,
        output=pick(
            rng,
            f"{meaning[0].upper()}{meaning[1:]}.",
            f"The {word} is {meaning}."
            if word
            in ("radius", "diameter", "average", "median", "perimeter", "product", "quotient", "difference", "sum")
            else f"It is {meaning}.",
        ),
    )


KINDS: Kinds = [
    ("arithmetic", 2.0, arithmetic),
    ("chain", 1.3, chain),
    ("division", 1.0, division),
    ("percent", 1.0, percent),
    ("fraction", 1.0, fraction),
    ("equation", 1.5, equation),
    ("divisors", 1.0, divisors),
    ("prime", 0.7, prime),
    ("area", 1.0, area),
    ("average", 1.0, average),
    ("power", 0.8, power),
    ("shopping", 0.9, shopping),
    ("travel", 0.7, travel),
    ("ages", 0.6, ages),
    ("concept", 0.5, concept),
]
